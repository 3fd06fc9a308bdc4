"""`headrace devices`."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace_cli import formats
from headrace_cli.exits import reported
from headrace_cli.output import print_json, print_rows
from headrace_cli.settings import settings_of


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
        residencies = client.residencies.list(include_ended=include_ended)
    if settings.json:
        print_json({"nodes": nodes, "residencies": residencies})
        return
    rows = [
        (
            node.id,
            node.state.value,
            node.address,
            device.id,
            device.name,
            formats.size(device.capacity_bytes),
            formats.size(device.reserved_bytes),
            formats.size(device.free_bytes),
        )
        for node in nodes
        for device in node.devices
    ]
    headings = ("node", "state", "address", "device", "name", "capacity", "reserved", "free")
    print_rows(settings, nodes, headings, rows, empty="no nodes; start one with `headrace serve extractor`")
    if residencies:
        typer.echo()
        held = [
            (
                one.model_id,
                one.node_id,
                one.device_id,
                one.state.value,
                formats.size(one.measured_bytes or one.reserved_bytes),
                str(one.n_leases),
                one.reason,
            )
            for one in residencies
        ]
        print_rows(settings, residencies, ("model", "node", "device", "state", "size", "leases", "why"), held, empty="")
