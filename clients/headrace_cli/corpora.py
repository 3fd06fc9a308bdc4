"""`headrace corpora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli import formats
from headrace_cli.exits import reported
from headrace_cli.output import note, print_json, print_rows, print_value
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import Corpus

app = typer.Typer(help="Sources of documents.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
@reported
def add(
    context: typer.Context,
    *,
    corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id to give it.")],
    path: Annotated[str, typer.Argument(help="A .txt, .jsonl, .csv or .parquet file.")],
    on_node: Annotated[
        bool, typer.Option("--on-node", help="The path is on the node's disk: nothing is uploaded.")
    ] = False,
    format_: Annotated[str, typer.Option("--format", help="txt, jsonl, csv or parquet; by the name's ending.")] = "",
    text_column: Annotated[str, typer.Option(help="Column or key with the text.  (default: text)")] = "",
    text_split: Annotated[str, typer.Option(help="For txt: blank_lines, lines, form_feeds or none.")] = "",
    node: Annotated[str, typer.Option(help="Node to keep it.")] = "",
) -> None:
    """Upload a corpus, or register one that lies on the node."""
    settings = settings_of(context)
    with settings.connect() as client:
        make = client.corpora.register_path if on_node else client.corpora.upload
        where = path if on_node else Path(path).expanduser()
        corpus = make(corpus_id, where, format=format_, text_column=text_column, text_split=text_split, node=node)
    facts = dict(zip(_HEADINGS, _row(corpus), strict=True)) | {"digest": corpus.digest}
    print_value(settings, corpus, facts)


@app.command("list")
@reported
def list_corpora(context: typer.Context, node: Annotated[str, typer.Option(help="Only of this node.")] = "") -> None:
    """List corpora."""
    settings = settings_of(context)
    with settings.connect() as client:
        corpora = list(client.corpora.list(node=node))
    rows = [_row(corpus) for corpus in corpora]
    print_rows(settings, corpora, _HEADINGS, rows, empty="no corpora; add one with `headrace corpora add`")


@app.command("rm")
@reported
def remove(context: typer.Context, corpus_id: Annotated[str, typer.Argument(metavar="CORPUS")]) -> None:
    """Delete a corpus; activation sets made from it stay."""
    settings = settings_of(context)
    with settings.connect() as client:
        client.corpora.delete(corpus_id)
    if settings.json:
        print_json({"deleted": corpus_id})
    else:
        note(f"deleted {corpus_id}")


_HEADINGS = ("id", "documents", "size", "kind", "origin", "added")


def _row(corpus: Corpus) -> tuple[str, ...]:
    return (
        corpus.id,
        formats.count(corpus.n_documents),
        formats.size(corpus.size_bytes),
        "token ids" if corpus.tokenized else "text",
        corpus.origin,
        formats.time_of_day(corpus.create_time),
    )
