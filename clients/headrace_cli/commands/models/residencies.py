"""`headrace residencies`, and `headrace models load` and `unload`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ModelId, OnlyModel, OnlyNode
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.live import LiveResidencies
from headrace_cli.output.progress import Bar, show_residency
from headrace_cli.output.results import note, print_json, print_rows, print_value
from headrace_cli.output.tables import Column, facts_of
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import Residency, ResidencyEvent

COLUMNS = (
    Column("model"),
    Column("node", 3),
    Column("device", 2),
    Column("state"),
    Column("size", 1),
    Column("loaded", 4),
    Column("load time", 6),
    Column("holders", 7, prose=True),
    Column("queue", 5),
    Column("reason", 8, prose=True),
)


@reported
def list_residencies(
    context: typer.Context,
    *,
    model: OnlyModel = "",
    node: OnlyNode = "",
    include_ended: Annotated[bool, typer.Option("--all", help="Also list residencies that have ended.")] = False,
) -> None:
    """List residencies, the newest first."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.residencies.list(model=model, node=node, include_ended=include_ended)
    print_rows(settings, found, COLUMNS, map(row, found), empty="no model is resident")


@reported
def watch(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option(metavar="MODEL", help="Watch this model only.")] = "",
    after_seq: Annotated[
        int, typer.Option(metavar="SEQ", help="Begin after the event of this number; 0: begin with all residencies.")
    ] = 0,
    wait_s: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time to watch.")] = 86400.0,
) -> None:
    """Watch residencies change. A live table on a terminal; elsewhere, or with --json, one event a line."""
    settings = settings_of(context)
    with settings.connect() as client:
        events = client.residencies.watch(model=model, after_seq=after_seq, deadline_s=wait_s)
        if sys.stdout.isatty() and not settings.json:
            LiveResidencies(client, model=model, columns=COLUMNS, row=row, line=_line).show(events)
            return
        for event in events:
            if settings.json:
                print_json(event)
            else:
                typer.echo(_line(event))


@reported
def load(
    context: typer.Context,
    *,
    model_id: ModelId,
    node: Annotated[
        str, typer.Option(metavar="NODE", help="Node to load it on.  (default: chosen by the registry)")
    ] = "",
    device: Annotated[
        str, typer.Option(help="Device of the node, such as cuda:0.  (default: chosen by the registry)")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the model is resident.")] = True,
    wait_s: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time to wait.")] = 3600.0,
) -> None:
    """Load a model into a device's memory."""
    settings = settings_of(context)
    with settings.connect() as client:
        residency = client.residencies.load(model_id, node=node, device=device)
        if wait:
            residency = until_resident(client, residency, wait_s)
    print_value(settings, residency, facts_of(COLUMNS, row(residency)))


@reported
def unload(
    context: typer.Context,
    *,
    model_id: ModelId,
    node: Annotated[str, typer.Option(metavar="NODE", help="Node to unload it from.  (default: every node)")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Unload it even if it is leased or pinned; the leases are lost.")
    ] = False,
) -> None:
    """Remove a model from memory. Its files stay on disk."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.residencies.unload(model_id, node=node, force=force)
    print_rows(settings, found, COLUMNS, map(row, found), empty=f"{model_id} is not resident")


@reported
def evict(
    context: typer.Context,
    *,
    free: Annotated[str, typer.Option(metavar="SIZE", help="Bytes that shall be free: 20GB, 8GiB.")],
    node: Annotated[str, typer.Option(metavar="NODE", help="Node.  (default: where the fewest bytes have to go)")] = "",
    device: Annotated[
        str, typer.Option(help="Device of the node, such as cuda:0.  (default: GPUs before the CPU)")
    ] = "",
) -> None:
    """Unload the least recently used idle models of a device until so many bytes are free there.

    Models in use or pinned stay. If they are in the way, nothing is unloaded.
    """
    settings = settings_of(context)
    with settings.connect() as client:
        done = client.residencies.evict(formats.bytes_of("--free", free), node=node, device=device)
    if settings.json:
        print_json(done)
        return
    if done.residencies:
        print_rows(settings, done.residencies, COLUMNS, map(row, done.residencies), empty="")
    freed = sum(one.measured_bytes or one.reserved_bytes for one in done.residencies)
    evicted = f"{formats.things(len(done.residencies), 'model')} evicted, {formats.size(freed)} freed"
    place = f"{done.node_id}/{done.device_id}"
    note(f"{evicted if done.residencies else 'nothing evicted'}; {formats.size(done.free_bytes)} free on {place}")


def row(residency: Residency) -> tuple[str, ...]:
    """Returns the cells of a residency, as `COLUMNS` names them."""
    return (
        residency.model_id,
        residency.node_id,
        residency.device_id,
        residency.state.value.lower(),
        formats.size(residency.measured_bytes or residency.reserved_bytes),
        formats.ago(residency.resident_time, datetime.now(UTC)) if not residency.ended else "",
        formats.seconds(residency.load_s),
        holders(residency),
        str(residency.queue_position or ""),
        residency.reason,
    )


def until_resident(client: HeadraceClient, residency: Residency, wait_s: float) -> Residency:
    """Shows a model's way into memory; returns the residency once it is resident."""
    if residency.state == "RESIDENT":
        return residency
    with Bar(residency.model_id) as bar:
        return client.residencies.wait(residency, lambda now: show_residency(bar, now), wait_s)


def holders(residency: Residency) -> str:
    """Returns the holders of leases, and whether there is a pin: `anna, someone, 1 more, pinned`."""
    names = [name or "someone" for name in residency.holders]
    if residency.n_leases > len(names):
        names.append(f"{residency.n_leases - len(names)} more")
    return ", ".join([*names, *(["pinned"] if residency.pinned else [])])


def _line(event: ResidencyEvent) -> str:
    residency = event.residency
    place = f"{residency.model_id} on {residency.node_id}/{residency.device_id}"
    cause = "" if event.snapshot else f" · {residency.reason} ({residency.actor})"
    return f"{formats.local_time(event.time)}  {place}  {residency.state.value.lower()}{cause}"
