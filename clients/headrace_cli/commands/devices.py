"""`headrace devices`."""

from __future__ import annotations

from collections.abc import Sequence
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
    include_ended: Annotated[bool, typer.Option("--all", help="Also residencies that have ended.")] = False,
) -> None:
    """List nodes, their devices, and what is in their memory."""
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
        print_rows(settings, nodes, *_filled(_DEVICES, rows), empty="no devices")
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
    there = [one for one in found if (one.node_id, one.device_id) == (node.id, device.id) and not one.ended]
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
        ", ".join(_held_by(one) for one in there if one.state != "QUEUED"),
    )


def _filled(headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Leaves out columns that are empty in every row: without a GPU there are several, and terminals are narrow."""
    kept = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    return tuple(headings[n] for n in kept), [tuple(row[n] for n in kept) for row in rows]


def _held_by(one: Residency) -> str:
    who = residencies.holders(one)
    return f"{one.model_id} ({who})" if who else one.model_id


def _known(n_bytes: int) -> str:
    return formats.size(n_bytes) if n_bytes else ""
