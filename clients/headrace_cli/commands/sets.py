"""`headrace sets`, except `export`."""

from __future__ import annotations

import getpass

import typer

from headrace_cli.commands.options import (
    OnlyModel,
    OnlyNode,
    PinFor,
    PinOwner,
    PinReason,
    SetId,
    expire_time,
    whole_set_id,
)
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_done, print_json, print_rows, print_value
from headrace_cli.settings import settings_of


@reported
def list_sets(context: typer.Context, model: OnlyModel = "", node: OnlyNode = "") -> None:
    """List activation sets with their sizes, last use and pins."""
    settings = settings_of(context)
    with settings.connect() as client:
        sets = list(client.sets.list(model=model, node=node))
    rows = []
    for held in sets:
        # Pins and holders protect a set from eviction; three of them are enough to see why it stays.
        kept_by = ", ".join([*(f"pin of {pin.owner}" for pin in held.pins), *held.holders][:3])
        rows.append(
            (
                held.id[:16],
                held.node_id,
                held.model_id,
                held.corpus_id,
                formats.count(held.n_rows),
                formats.size(held.size_bytes),
                formats.local_time(held.last_used_time),
                "being deleted" if held.deleting else kept_by,
                "yes" if held.complete else "no",
            )
        )
    headings = ("set", "node", "model", "corpus", "rows", "size", "last used", "kept by", "complete")
    print_rows(settings, sets, headings, rows, empty="no activation sets; make one with `headrace extract`")


@reported
def show(context: typer.Context, set_id: SetId) -> None:
    """Show an activation set, once for each node that holds it."""
    settings = settings_of(context)
    with settings.connect() as client:
        sets = client.sets.get(whole_set_id(client, set_id))
    if settings.json:
        print_json(sets)
        return
    for held in sets:
        pins = []
        for pin in held.pins:
            until = f" until {formats.local_time(pin.expire_time)}" if pin.expire_time else ""
            pins.append(pin.owner + until + (f" ({pin.reason})" if pin.reason else ""))
        facts = {
            "set": held.id,
            "node": held.node_id,
            "model": held.model_id,
            "corpus": held.corpus_id,
            "columns": ", ".join(held.columns),
            "rows": formats.count(held.n_rows),
            "size": formats.size(held.size_bytes),
            "complete": "yes" if held.complete else "no",
            "retention": held.retention.lower(),
            "path": held.path,
            "last used": formats.local_time(held.last_used_time),
            "used by": ", ".join(held.holders),
            "pinned by": "; ".join(pins),
            "state": "being deleted" if held.deleting else "",
            "last report": formats.local_time(held.update_time),
        }
        # Without the empty facts, so that they do not widen the column of names.
        print_value(settings, held, {name: fact for name, fact in facts.items() if fact})


@reported
def pin(
    context: typer.Context, *, set_id: SetId, owner: PinOwner = "", reason: PinReason = "", for_: PinFor = ""
) -> None:
    """Protect a set from eviction and deletion. Pinning it again changes the pin."""
    settings = settings_of(context)
    name, end = owner or getpass.getuser(), expire_time(for_)
    with settings.connect() as client:
        whole_id = whole_set_id(client, set_id)
        client.sets.pin(whole_id, name, reason=reason, expire_time=end)
    until = f"until {formats.local_time(end)}" if end else "for ever"
    value = {"pinned": whole_id, "owner": name, "expire_time": end}
    print_done(settings, value, f"{whole_id[:16]} is pinned by {name} {until}")


@reported
def unpin(context: typer.Context, *, set_id: SetId, owner: PinOwner = "") -> None:
    """Remove a pin from a set."""
    settings = settings_of(context)
    name = owner or getpass.getuser()
    with settings.connect() as client:
        whole_id = whole_set_id(client, set_id)
        client.sets.unpin(whole_id, name)
    print_done(settings, {"unpinned": whole_id, "owner": name}, f"{name} has no pin on {whole_id[:16]} any more")


@reported
def delete(context: typer.Context, *, set_id: SetId) -> None:
    """Delete a set on all nodes. Extracting it again gives the same rows."""
    settings = settings_of(context)
    with settings.connect() as client:
        whole_id = whole_set_id(client, set_id)
        client.sets.delete(whole_id)
    print_done(settings, {"deleted": whole_id}, f"{whole_id[:16]} will be deleted within seconds")
