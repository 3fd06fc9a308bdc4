"""`headrace corpora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_json, print_rows, print_value
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client.values import Corpus

TextColumn = Annotated[str, typer.Option(help="Column or key with the text; dots lead inwards.  (default: text)")]
Chat = Annotated[bool, typer.Option("--chat", help="The column holds conversations: lists of role and content.")]
MaxDocuments = Annotated[int, typer.Option(help="Stop after so many documents.  (default: all)", min=0)]

app = typer.Typer(help="Sources of documents.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
@reported
def add(
    context: typer.Context,
    *,
    corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id to give it.")],
    path: Annotated[str, typer.Argument(help="A .txt, .jsonl, .csv, .parquet or .npy file.")],
    on_node: Annotated[
        bool, typer.Option("--on-node", help="The path is on the node's disk: nothing is uploaded.")
    ] = False,
    format_: Annotated[
        str, typer.Option("--format", help="txt, jsonl, csv, parquet or token_ids; by the name's ending.")
    ] = "",
    text_column: TextColumn = "",
    text_split: Annotated[str, typer.Option(help="For txt: blank_lines, lines, form_feeds or none.")] = "",
    chat: Chat = False,
    node: Annotated[str, typer.Option(help="Node to keep it.")] = "",
) -> None:
    """Upload a corpus, or register one that lies on the node."""
    settings = settings_of(context)
    with settings.connect() as client:
        make = client.corpora.register_path if on_node else client.corpora.upload
        where = path if on_node else Path(path).expanduser()
        what: dict[str, Any] = {"format": format_, "text_column": text_column, "text_split": text_split, "chat": chat}
        corpus = make(corpus_id, where, node=node, **what)
    _print_corpus(settings, corpus)


@app.command("add-hub")
@reported
def add_hub(
    context: typer.Context,
    *,
    corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id to give it.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Dataset on the Hugging Face hub.")],
    revision: Annotated[str, typer.Option(help="Commit, tag or branch.  (default: main)")] = "",
    config: Annotated[str, typer.Option(help="Configuration, for datasets that have several.")] = "",
    split: Annotated[str, typer.Option(help="Split, for datasets that have several.")] = "",
    text_column: TextColumn = "",
    token_ids: Annotated[bool, typer.Option("--token-ids", help="The column holds lists of token ids.")] = False,
    chat: Chat = False,
    max_documents: MaxDocuments = 0,
    hub_token_file: Annotated[Path | None, typer.Option(help="File with a hub token, for gated datasets.")] = None,
    node: Annotated[str, typer.Option(help="Node to keep it.")] = "",
) -> None:
    """Read a dataset of the hub on a node that has headrace[datasets]."""
    settings = settings_of(context)
    with settings.connect() as client:
        corpus = client.corpora.register_hub(
            corpus_id,
            repo_id,
            revision=revision,
            config=config,
            split=split,
            text_column=text_column,
            token_ids=token_ids,
            chat=chat,
            max_documents=max_documents,
            hub_token=hub_token_file.read_text().strip() if hub_token_file else "",
            node=node,
        )
    _print_corpus(settings, corpus)


@app.command("add-mix")
@reported
def add_mix(
    context: typer.Context,
    *,
    corpus_id: Annotated[str, typer.Argument(metavar="CORPUS", help="Id to give it.")],
    parts: Annotated[list[str], typer.Argument(metavar="CORPUS=WEIGHT...", help="At least two corpora of one node.")],
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    max_documents: MaxDocuments = 0,
    node: Annotated[str, typer.Option(help="Node that holds them.")] = "",
) -> None:
    """Mix corpora into a new one, drawing each document's corpus by weight."""
    settings = settings_of(context)
    weights = dict(map(_weight, parts))
    if len(weights) < len(parts):
        raise typer.BadParameter("names a corpus twice", param_hint="CORPUS=WEIGHT")
    with settings.connect() as client:
        corpus = client.corpora.register_mix(corpus_id, weights, seed=seed, max_documents=max_documents, node=node)
    _print_corpus(settings, corpus)


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


def _weight(part: str) -> tuple[str, float]:
    corpus_id, _, weight = part.partition("=")
    try:
        return corpus_id, float(weight or 1)
    except ValueError as exc:
        raise typer.BadParameter(f"{part!r} is no CORPUS=WEIGHT", param_hint="CORPUS=WEIGHT") from exc


def _print_corpus(settings: Settings, corpus: Corpus) -> None:
    facts = dict(zip(_HEADINGS, _row(corpus), strict=True)) | {"digest": corpus.digest}
    print_value(settings, corpus, facts)


_HEADINGS = ("id", "documents", "size", "kind", "origin", "added")


def _row(corpus: Corpus) -> tuple[str, ...]:
    return (
        corpus.id,
        formats.count(corpus.n_documents),
        formats.size(corpus.size_bytes),
        "token ids" if corpus.tokenized else "chat" if corpus.chat else "text",
        corpus.origin,
        formats.time_of_day(corpus.create_time),
    )
