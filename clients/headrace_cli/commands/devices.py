"""`headrace devices`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.models import residencies
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_json, print_rows
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import Device, Node, Residency

_NODES = ("node", "state", "address", "memory", "free", "limits")
_DEVICES = (
    "node",
    "device",
    "name",
    "capability",
    "flash attention",
    "total",
    "for models",
    "held",
    "free",
    "lost",
    "held by",
)


@reported
def devices(
    context: typer.Context,
    *,
    include_ended: Annotated[bool, typer.Option("--all", help="Also list residencies that have ended.")] = False,
) -> None:
    """List nodes, their devices, and the models in their memory."""
    settings = settings_of(context)
    with settings.connect() as client:
        nodes = client.nodes()
        found = client.residencies.list(include_ended=include_ended)
    if settings.json:
        print_json({"nodes": nodes, "residencies": found})
        return
    empty = "no nodes; start one with `headrace serve extractor`"
    print_rows(settings, nodes, _NODES, map(_node_row, nodes), empty=empty)
    if nodes:
        typer.echo()
        rows = [_device_row(node, device, found) for node in nodes for device in node.devices]
        # Columns that are empty in every row are left out: without a GPU there are several, and terminals are narrow.
        kept = [n for n in range(len(_DEVICES)) if any(row[n] for row in rows)]
        headings = [_DEVICES[n] for n in kept]
        print_rows(settings, nodes, headings, [[row[n] for n in kept] for row in rows], empty="no devices")
    if found:
        typer.echo()
        print_rows(settings, found, residencies.HEADINGS, map(residencies.row, found), empty="")


def _node_row(node: Node) -> tuple[str, ...]:
    limits = [formats.things(node.max_loads, "load")] if node.max_loads else []
    limits += [formats.things(node.max_residents, "model")] if node.max_residents else []
    return (
        node.id,
        node.state.value,
        node.address,
        _known(node.memory_bytes),
        _known(node.memory_free_bytes),
        ", ".join(limits) or "none",
    )


def _device_row(node: Node, device: Device, found: tuple[Residency, ...]) -> tuple[str, ...]:
    held_by = []
    for residency in found:
        holds_memory = not residency.ended and residency.state != "QUEUED"
        if holds_memory and (residency.node_id, residency.device_id) == (node.id, device.id):
            holders = residencies.holders(residency)
            held_by.append(f"{residency.model_id} ({holders})" if holders else residency.model_id)
    return (
        node.id,
        device.id,
        device.name,
        device.capability,
        ("yes" if device.flash_attention else "no") if device.kind == "cuda" else "",
        _known(device.total_bytes),
        formats.size(device.capacity_bytes),
        formats.size(device.reserved_bytes),
        formats.size(device.free_bytes),
        _known(device.lost_bytes),
        ", ".join(held_by),
    )


def _known(n_bytes: int) -> str:
    """Returns a size; empty for 0: not known, or nothing lost."""
    return formats.size(n_bytes) if n_bytes else ""
