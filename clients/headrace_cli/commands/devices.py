"""`headrace devices`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.models import residencies
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_json, print_rows
from headrace_cli.output.tables import Column
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import Device, Node, Residency

_NODES = (
    Column("node"),
    Column("state"),
    Column("address", 1),
    Column("memory", 3),
    Column("free", 2),
    Column("limits", 4),
)
_DEVICES = (
    Column("node", 1),
    Column("device"),
    Column("name", 6),
    Column("capability", 7),
    Column("flash attention", 8),
    Column("total", 5),
    Column("for models", 4),
    Column("held", 3),
    Column("free"),
    Column("lost", 9),
    Column("held by", 2, prose=True),
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
        # Without a GPU, several columns are empty in every row.
        kept = [n for n in range(len(_DEVICES)) if any(row[n] for row in rows)]
        columns = [_DEVICES[n] for n in kept]
        print_rows(settings, nodes, columns, [[row[n] for n in kept] for row in rows], empty="no devices")
    if found:
        typer.echo()
        print_rows(settings, found, residencies.COLUMNS, map(residencies.row, found), empty="")


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


def _device_row(node: Node, device: Device, found: Sequence[Residency]) -> tuple[str, ...]:
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
