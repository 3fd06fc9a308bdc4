"""`headrace sets`."""

from __future__ import annotations

import datetime as dt
import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands import sets_export
from headrace_cli.commands.options import whole_id
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_json, print_rows, print_value
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import ActivationSet, SetPin

app = typer.Typer(
    help="Activation sets on all nodes: list, pin, delete, export.", no_args_is_help=True, rich_markup_mode=None
)
app.command()(sets_export.export)
_SetId = Annotated[str, typer.Argument(metavar="SET", help="Id, or its beginning.")]
_Owner = Annotated[str, typer.Option(help="Whose wish it is; you, if not given.")]


@app.command("list")
@reported
def list_sets(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Only of this model.")] = "",
    node: Annotated[str, typer.Option(help="Only on this node.")] = "",
) -> None:
    """List activation sets with their sizes, last use and pins."""
    settings = settings_of(context)
    with settings.connect() as client:
        sets = list(client.sets.list(model=model, node=node))
    rows = [
        (
            one.id[:16],
            one.node_id,
            one.model_id,
            one.corpus_id,
            formats.count(one.n_rows),
            formats.size(one.size_bytes),
            formats.time_of_day(one.last_used_time),
            _use(one),
            "yes" if one.complete else "no",
        )
        for one in sets
    ]
    headings = ("set", "node", "model", "corpus", "rows", "size", "last used", "kept by", "complete")
    print_rows(settings, sets, headings, rows, empty="no activation sets; make one with `headrace extract`")


@app.command()
@reported
def show(context: typer.Context, set_id: _SetId) -> None:
    """Show what each node holds of a set."""
    settings = settings_of(context)
    with settings.connect() as client:
        sets = client.sets.get(whole_id(client, set_id))
    if settings.json:
        print_json(sets)
        return
    for one in sets:
        facts = {
            "set": one.id,
            "node": one.node_id,
            "model": one.model_id,
            "corpus": one.corpus_id,
            "columns": ", ".join(one.columns),
            "rows": formats.count(one.n_rows),
            "size": formats.size(one.size_bytes),
            "complete": "yes" if one.complete else "no",
            "retention": one.retention.lower(),
            "path": one.path,
            "last used": formats.time_of_day(one.last_used_time),
            "used by": ", ".join(one.holders),
            "pinned by": "; ".join(map(_pin_words, one.pins)),
            "state": "being deleted" if one.deleting else "",
            "last report": formats.time_of_day(one.update_time),
        }
        print_value(settings, one, {name: fact for name, fact in facts.items() if fact})


@app.command()
@reported
def pin(
    context: typer.Context,
    *,
    set_id: _SetId,
    owner: _Owner = "",
    reason: Annotated[str, typer.Option(help="Why; others read it.")] = "",
    for_: Annotated[str, typer.Option("--for", help="How long, such as 90m, 8h or 7d; for ever if not given.")] = "",
) -> None:
    """Keep a set from eviction and deletion. Again changes the pin."""
    settings = settings_of(context)
    whose, end = owner or getpass.getuser(), _end(for_)
    with settings.connect() as client:
        whole = whole_id(client, set_id)
        client.sets.pin(whole, whose, reason=reason, expire_time=end)
    if settings.json:
        print_json({"pinned": whole, "owner": whose, "expire_time": end})
    else:
        note(f"{whole[:16]} is kept for {whose} " + (f"until {formats.time_of_day(end)}" if end else "for ever"))


@app.command()
@reported
def unpin(context: typer.Context, *, set_id: _SetId, owner: _Owner = "") -> None:
    """Remove a pin."""
    settings = settings_of(context)
    whose = owner or getpass.getuser()
    with settings.connect() as client:
        whole = whole_id(client, set_id)
        client.sets.unpin(whole, whose)
    if settings.json:
        print_json({"unpinned": whole, "owner": whose})
    else:
        note(f"no pin of {whose} on {whole[:16]} any more")


@app.command()
@reported
def delete(context: typer.Context, *, set_id: _SetId) -> None:
    """Delete a set on all nodes; extracting it again makes the same rows."""
    settings = settings_of(context)
    with settings.connect() as client:
        whole = whole_id(client, set_id)
        client.sets.delete(whole)
    if settings.json:
        print_json({"deleted": whole})
    else:
        note(f"{whole[:16]} goes within seconds")


def _use(one: ActivationSet) -> str:
    """Why it is not evicted."""
    if one.deleting:
        return "being deleted"
    owners = [f"pin of {pin.owner}" for pin in one.pins]
    return ", ".join([*owners, *one.holders][:3])


def _pin_words(pin: SetPin) -> str:
    until = f" until {formats.time_of_day(pin.expire_time)}" if pin.expire_time else ""
    return pin.owner + until + (f" ({pin.reason})" if pin.reason else "")


def _end(for_: str) -> dt.datetime | None:
    if not for_:
        return None
    try:
        return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=formats.parse_duration(for_))
    except (ValueError, OverflowError) as exc:
        raise typer.BadParameter(str(exc), param_hint="--for") from exc
