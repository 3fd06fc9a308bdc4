"""`headrace models pin`, `unpin` and `pins`."""

from __future__ import annotations

import datetime as dt
import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_json, print_rows, print_value
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import Pin

_OWNER_HELP = "Whose wish it is; you, if not given."


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(pin)
    app.command()(unpin)
    app.command("pins")(list_pins)


@reported
def pin(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    owner: Annotated[str, typer.Option(help=_OWNER_HELP)] = "",
    reason: Annotated[str, typer.Option(help="Why; others read it.")] = "",
    node: Annotated[str, typer.Option(help="On this node only.")] = "",
    for_: Annotated[str, typer.Option("--for", help="How long, such as 90m, 8h or 7d; for ever if not given.")] = "",
) -> None:
    """Keep a model where it is resident: neither evicted nor unloaded for being idle. Again changes the pin."""
    settings = settings_of(context)
    expire_time = dt.datetime.now(dt.UTC) + _duration(for_) if for_ else None
    with settings.connect() as client:
        one = client.pins.pin(model_id, owner or getpass.getuser(), reason=reason, node=node, expire_time=expire_time)
    print_value(settings, one, dict(zip(_HEADINGS, _row(one), strict=True)))


@reported
def unpin(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    owner: Annotated[str, typer.Option(help=_OWNER_HELP)] = "",
    node: Annotated[str, typer.Option(help="The pin of this node; the one for any node if not given.")] = "",
) -> None:
    """Remove a pin."""
    settings = settings_of(context)
    whose = owner or getpass.getuser()
    with settings.connect() as client:
        client.pins.unpin(model_id, whose, node=node)
    if settings.json:
        print_json({"unpinned": model_id, "owner": whose, "node_id": node})
    else:
        note(f"no pin of {whose} on {model_id}" + (f" at {node}" if node else "") + " any more")


@reported
def list_pins(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="[MODEL]")] = "",
) -> None:
    """List pins."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = list(client.pins.list(model=model_id))
    print_rows(settings, found, _HEADINGS, map(_row, found), empty="no pins")


_HEADINGS = ("model", "node", "owner", "reason", "until")


def _row(one: Pin) -> tuple[str, ...]:
    return (
        one.model_id,
        one.node_id or "any",
        one.owner,
        one.reason,
        formats.time_of_day(one.expire_time) or "for ever",
    )


def _duration(text: str) -> dt.timedelta:
    try:
        return dt.timedelta(seconds=formats.parse_duration(text))
    except (ValueError, OverflowError) as exc:
        raise typer.BadParameter(str(exc), param_hint="--for") from exc
