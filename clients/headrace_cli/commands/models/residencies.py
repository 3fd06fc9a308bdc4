"""`headrace residencies`, and `headrace models load` and `unload`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.live import LiveResidencies
from headrace_cli.output.progress import Bar, show_residency
from headrace_cli.output.results import print_json, print_rows, print_value
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import Residency, ResidencyEvent

app = typer.Typer(help="Models in memory: where, how much, held by whom.", no_args_is_help=True, rich_markup_mode=None)

HEADINGS = ("model", "node", "device", "state", "size", "holders", "queue", "reason")
_LOOK_EVERY_S = 0.3


def add_to(models: typer.Typer) -> None:
    """Adds `load` and `unload` to `headrace models`."""
    models.command()(load)
    models.command()(unload)


@app.command("list")
@reported
def list_residencies(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option(help="Only of this model.")] = "",
    node: Annotated[str, typer.Option(help="Only on this node.")] = "",
    include_ended: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
) -> None:
    """List residencies, the newest first."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.residencies.list(model=model, node=node, include_ended=include_ended)
    print_rows(settings, found, HEADINGS, map(row, found), empty="nothing is resident")


@app.command()
@reported
def watch(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Option(help="Only of this model.")] = "",
    after_seq: Annotated[int, typer.Option(help="Begin behind this event instead of with what is there.")] = 0,
    wait_s: Annotated[float, typer.Option(help="Longest time to watch.")] = 86400.0,
) -> None:
    """Watch residencies change: a live table on a terminal, a line for each event elsewhere, JSON with --json."""
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
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    node: Annotated[str, typer.Option(help="On this node; the registry chooses if not given.")] = "",
    device: Annotated[str, typer.Option(help="On this device of the node.")] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is resident.")] = True,
    wait_s: Annotated[float, typer.Option(help="Longest wait.")] = 3600.0,
) -> None:
    """Make a model resident."""
    settings = settings_of(context)
    with settings.connect() as client:
        residency = client.residencies.load(model_id, node=node, device=device)
        if wait and residency.state != "RESIDENT":
            with Bar(model_id) as bar:
                residency = _until_resident(client, residency, bar, wait_s)
    _print(settings, residency)


@reported
def unload(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    node: Annotated[str, typer.Option(help="On this node; everywhere if not given.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Even if leased or pinned: leases are lost.")] = False,
) -> None:
    """Send a model out of memory; its files stay."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.residencies.unload(model_id, node=node, force=force)
    print_rows(settings, found, HEADINGS, map(row, found), empty=f"{model_id} is not resident")


def row(one: Residency) -> tuple[str, ...]:
    """A residency in a table."""
    return (
        one.model_id,
        one.node_id,
        one.device_id,
        one.state.value.lower(),
        formats.size(one.measured_bytes or one.reserved_bytes),
        holders(one),
        str(one.queue_position or ""),
        one.reason,
    )


def holders(one: Residency) -> str:
    """Who keeps it there: `anna, bert +3, pinned`."""
    names = [name or "someone" for name in one.holders]
    if one.n_leases > len(names):
        names.append(f"{one.n_leases - len(names)} more")
    return ", ".join([*names, *(["pinned"] if one.pinned else [])])


def _line(event: ResidencyEvent) -> str:
    one = event.residency
    place = f"{one.model_id} on {one.node_id}/{one.device_id}"
    seen = "" if event.snapshot else f" · {one.reason} ({one.actor})"
    return f"{formats.time_of_day(event.time)}  {place}  {one.state.value.lower()}{seen}"


def _until_resident(client: HeadraceClient, residency: Residency, bar: Bar, wait_s: float) -> Residency:
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
        time.sleep(_LOOK_EVERY_S)
        residency = _again(client, residency)
    show_residency(bar, residency)
    return residency


def _again(client: HeadraceClient, residency: Residency) -> Residency:
    """The residency as it is now; another one of the model where that took the place of one that never loaded."""
    active = client.residencies.list(model=residency.model_id)
    if same := [one for one in active if one.id == residency.id]:
        return same[0]
    ended = client.residencies.list(model=residency.model_id, include_ended=True)
    now = next((one for one in ended if one.id == residency.id), residency)
    return active[0] if active and now.state == "UNLOADED" else now


def _print(settings: Settings, residency: Residency) -> None:
    print_value(settings, residency, dict(zip(HEADINGS, row(residency), strict=True)))
