"""`headrace sets`."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace_cli import formats
from headrace_cli.exits import reported
from headrace_cli.output import print_json, print_rows, print_value
from headrace_cli.settings import settings_of

app = typer.Typer(help="Activation sets on all nodes.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
@reported
def list_sets(context: typer.Context, model: Annotated[str, typer.Option(help="Only of this model.")] = "") -> None:
    """List activation sets."""
    settings = settings_of(context)
    with settings.connect() as client:
        sets = list(client.sets.list(model=model))
    rows = [
        (
            one.id[:16],
            one.node_id,
            one.model_id,
            one.corpus_id,
            formats.count(one.n_rows),
            formats.size(one.size_bytes),
            one.retention.lower(),
            "yes" if one.complete else "no",
        )
        for one in sets
    ]
    headings = ("set", "node", "model", "corpus", "rows", "size", "retention", "complete")
    print_rows(settings, sets, headings, rows, empty="no activation sets; make one with `headrace extract`")


@app.command()
@reported
def show(
    context: typer.Context, set_id: Annotated[str, typer.Argument(metavar="SET", help="Id, or its beginning.")]
) -> None:
    """Show what each node holds of a set."""
    settings = settings_of(context)
    with settings.connect() as client:
        found = [one.id for one in client.sets.list() if one.id.startswith(set_id)]
        sets = client.sets.get(found[0] if len(set(found)) == 1 else set_id)
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
            "last report": formats.time_of_day(one.update_time),
        }
        print_value(settings, one, facts)
