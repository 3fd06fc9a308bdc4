"""`headrace sets`, except `export`."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

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
from headrace_cli.output.progress import Bar
from headrace_cli.output.results import print_done, print_json, print_rows, print_value
from headrace_cli.output.tables import Column
from headrace_cli.settings import settings_of

_DAMAGES = (Column("column"), Column("rows"), Column("file", 1))
_COLUMNS = (
    Column("set"),
    Column("node", 8),
    Column("model", 1),
    Column("corpus", 2),
    Column("rows", 3),
    Column("size", 4),
    Column("last used", 6),
    Column("kept by", 7, prose=True),
    Column("complete", 5),
)


@reported
def list_sets(context: typer.Context, model: OnlyModel = "", node: OnlyNode = "") -> None:
    """List activation sets with their sizes, last use and pins."""
    settings = settings_of(context)
    with settings.connect() as client:
        sets = client.sets.list(model=model, node=node)
    rows, now = [], datetime.now(UTC)
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
                formats.ago(held.last_used_time, now),
                "being deleted" if held.deleting else kept_by,
                "yes" if held.complete else "no",
            )
        )
    print_rows(settings, sets, _COLUMNS, rows, empty="no activation sets; make one with `headrace extract`")


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
            "recipe": _words(held.identity.get("recipe")),
            "numbers": _words({name: held.identity.get(name) for name in ("compute_dtype", "load_options")}),
            "model files": _words(held.identity.get("model")),
            "path": held.path,
            "last used": formats.local_time(held.last_used_time),
            "used by": ", ".join(held.holders),
            "pinned by": "; ".join(pins),
            "state": "being deleted" if held.deleting else "",
            "last report": formats.local_time(held.update_time),
        }
        # Without the empty facts, so that they do not widen the column of names.
        print_value(settings, held, {name: fact for name, fact in facts.items() if fact})


def _words(part: Any) -> str:
    """A part of an identity in one line: `context_size=256 packing=packed`; what is off or unset is left out."""
    if isinstance(part, Mapping):
        return " ".join(f"{name}={_words(value)}" for name, value in part.items() if value not in (None, False, "", {}))
    return "" if part is None else str(part)


@reported
def verify(context: typer.Context, *, set_id: SetId) -> None:
    """Compare all files of a set with their digests, on each node that holds it. Exit code 1 if some are damaged."""
    from headrace_client.errors import DigestMismatch  # noqa: PLC0415

    settings = settings_of(context)
    done = []
    with settings.connect() as client, Bar("verify") as bar:
        whole_id = whole_set_id(client, set_id)
        for step in client.sets.verify(whole_id):
            fraction = step.size_bytes / step.total_bytes if step.total_bytes else None
            sizes = f"{formats.size(step.size_bytes)} of {formats.size(step.total_bytes)}"
            bar.show(step.node_id, fraction, f"{sizes} · {step.n_damaged} damaged")
            done += [step] if step.done else []
    n_damaged, n_files = sum(step.n_damaged for step in done), sum(step.n_files for step in done)
    damages = [damage for step in done for damage in step.damages]
    if n_damaged:
        if settings.json:
            print_json(done)
        else:
            rows = [(each.column or "(index)", f"{each.first_row}:{each.end_row or ''}", each.file) for each in damages]
            print_rows(settings, damages, _DAMAGES, rows, empty="")
        raise DigestMismatch(
            f"{n_damaged} of {n_files} files of set {whole_id[:16]} are damaged",
            remedy="start the extraction again (`headrace extract`), which computes their rows anew",
        )
    print_done(settings, done, f"{whole_id[:16]}: {formats.count(n_files)} files are as they were sealed")


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
