"""`headrace residencies`, and `headrace models load` and `unload`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ModelId, OnlyModel, OnlyNode
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.live import LiveResidencies
from headrace_cli.output.progress import Bar, show_residency
from headrace_cli.output.results import print_json, print_rows, print_value
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import Residency, ResidencyEvent

HEADINGS = ("model", "node", "device", "state", "size", "holders", "queue", "reason")
_POLL_S = 0.3


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
    print_rows(settings, found, HEADINGS, map(row, found), empty="no model is resident")


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
            LiveResidencies(client, model=model, headings=HEADINGS, row=row, line=_line).show(events)
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
        if wait and residency.state != "RESIDENT":
            with Bar(model_id) as bar:
                residency = _until_resident(client, residency, bar, wait_s)
    print_value(settings, residency, dict(zip(HEADINGS, row(residency), strict=True)))


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
    print_rows(settings, found, HEADINGS, map(row, found), empty=f"{model_id} is not resident")


def row(residency: Residency) -> tuple[str, ...]:
    """Returns the cells of a residency, as `HEADINGS` names them."""
    return (
        residency.model_id,
        residency.node_id,
        residency.device_id,
        residency.state.value.lower(),
        formats.size(residency.measured_bytes or residency.reserved_bytes),
        holders(residency),
        str(residency.queue_position or ""),
        residency.reason,
    )


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


def _until_resident(client: HeadraceClient, residency: Residency, bar: Bar, wait_s: float) -> Residency:
    """Waits until the model is resident; returns the residency. Raises the error with which the residency ended."""
    from headrace_client.errors import BY_REASON, DeadlineExceeded, HeadraceError  # noqa: PLC0415

    end = time.monotonic() + wait_s
    while residency.state != "RESIDENT":
        show_residency(bar, residency)
        if residency.ended:
            reason = residency.failure.reason if residency.failure else residency.state.value
            message = residency.failure.message if residency.failure else residency.reason
            raise BY_REASON.get(reason, HeadraceError)(message, reason=reason)
        if time.monotonic() > end:
            raise DeadlineExceeded(f"{residency.model_id} is still {residency.state.value.lower()} after {wait_s:g} s")
        time.sleep(_POLL_S)
        active = client.residencies.list(model=residency.model_id)
        if now := next((one for one in active if one.id == residency.id), None):
            residency = now
            continue
        ended = client.residencies.list(model=residency.model_id, include_ended=True)
        residency = next((one for one in ended if one.id == residency.id), residency)
        if active and residency.state == "UNLOADED":
            # It ended before it was loaded, and another residency of the model serves in its place.
            residency = active[0]
    show_residency(bar, residency)
    return residency
