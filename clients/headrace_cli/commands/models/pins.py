"""`headrace models pin`, `unpin` and `pins`."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ModelId, PinFor, PinOwner, PinReason, expire_time
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_done, print_rows, print_value
from headrace_cli.output.tables import Column, facts_of
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import Pin


@reported
def pin(
    context: typer.Context,
    *,
    model_id: ModelId,
    owner: PinOwner = "",
    reason: PinReason = "",
    node: Annotated[
        str, typer.Option(metavar="NODE", help="Pin the model on this node only.  (default: any node)")
    ] = "",
    for_: PinFor = "",
) -> None:
    """Protect a model from eviction and idle unloading. Pinning it again changes the pin.

    It is not loaded now, but when a node starts and no device has it.
    """
    settings = settings_of(context)
    end = expire_time(for_)
    with settings.connect() as client:
        made = client.pins.pin(model_id, owner or getpass.getuser(), reason=reason, node=node, expire_time=end)
    print_value(settings, made, facts_of(_COLUMNS, _row(made)))


@reported
def unpin(
    context: typer.Context,
    *,
    model_id: ModelId,
    owner: PinOwner = "",
    node: Annotated[
        str, typer.Option(metavar="NODE", help="Remove the pin of this node.  (default: the pin for any node)")
    ] = "",
) -> None:
    """Remove a pin from a model."""
    settings = settings_of(context)
    name = owner or getpass.getuser()
    with settings.connect() as client:
        client.pins.unpin(model_id, name, node=node)
    place = f" at {node}" if node else ""
    value = {"unpinned": model_id, "owner": name, "node_id": node}
    print_done(settings, value, f"{name} has no pin on {model_id}{place} any more")


@reported
def list_pins(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL", help="List the pins of this model only.")] = "",
) -> None:
    """List the pins of models."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = client.pins.list(model=model_id)
    print_rows(settings, found, _COLUMNS, map(_row, found), empty="no pins")


_COLUMNS = (
    Column("model"),
    Column("node", 2),
    Column("owner", 1),
    Column("reason", 4, prose=True),
    Column("until", 3),
)


def _row(pin: Pin) -> tuple[str, ...]:
    return (
        pin.model_id,
        pin.node_id or "any",
        pin.owner,
        pin.reason,
        formats.local_time(pin.expire_time) or "for ever",
    )
