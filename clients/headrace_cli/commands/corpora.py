"""`headrace corpora`: sources of documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.commands.options import CorpusId, HubTokenFile, NewCorpusId, OnlyNode, read_hub_token
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_done, print_rows, print_value
from headrace_cli.output.tables import Column, facts_of
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client.values import Corpus

_TextColumn = Annotated[
    str,
    typer.Option(metavar="NAME", help="Column or key of the text; a.b is the key b inside a.  (default: text)"),
]
_Chat = Annotated[
    bool, typer.Option("--chat", help="The column holds conversations: lists of objects with role and content.")
]
_MaxDocuments = Annotated[
    int, typer.Option(metavar="N", help="Largest number of documents.  (default: all)", min=0, show_default=False)
]
_Node = Annotated[
    str, typer.Option(metavar="NODE", help="Node that keeps the corpus.  (default: the first node that is alive)")
]


@reported
def add(
    context: typer.Context,
    *,
    corpus_id: NewCorpusId,
    path: Annotated[str, typer.Argument(metavar="FILE", help="A .txt, .jsonl, .json, .csv, .parquet or .npy file.")],
    on_node: Annotated[
        bool, typer.Option("--on-node", help="FILE is a path on the node's disk: nothing is uploaded.")
    ] = False,
    format_: Annotated[
        str,
        typer.Option("--format", help="txt, jsonl, csv, parquet or token_ids.  (default: by the end of the name)"),
    ] = "",
    text_column: _TextColumn = "",
    text_split: Annotated[
        str, typer.Option(help="What separates the documents of a txt file: blank_lines, lines, form_feeds or none.")
    ] = "",
    chat: _Chat = False,
    node: _Node = "",
) -> None:
    """Upload a corpus, or register a file on the node's disk."""
    settings = settings_of(context)
    with settings.connect() as client:
        make = client.corpora.register_path if on_node else client.corpora.upload
        where = path if on_node else Path(path).expanduser()
        spec: dict[str, Any] = {"format": format_, "text_column": text_column, "text_split": text_split, "chat": chat}
        corpus = make(corpus_id, where, node=node, **spec)
    _print_corpus(settings, corpus)


@reported
def add_hub(
    context: typer.Context,
    *,
    corpus_id: NewCorpusId,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Dataset on the Hugging Face hub.")],
    revision: Annotated[str, typer.Option(help="Commit, tag or branch.  (default: main)")] = "",
    config: Annotated[str, typer.Option(help="Configuration, for a dataset that has several.")] = "",
    split: Annotated[str, typer.Option(help="Split, for a dataset that has several.")] = "",
    text_column: _TextColumn = "",
    token_ids: Annotated[bool, typer.Option("--token-ids", help="The column holds lists of token ids.")] = False,
    chat: _Chat = False,
    max_documents: _MaxDocuments = 0,
    hub_token_file: HubTokenFile = None,
    node: _Node = "",
) -> None:
    """Register a dataset of the Hugging Face hub. The node needs headrace[datasets]."""
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
            hub_token=read_hub_token(hub_token_file),
            node=node,
        )
    _print_corpus(settings, corpus)


@reported
def add_mix(
    context: typer.Context,
    *,
    corpus_id: NewCorpusId,
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS=WEIGHT", help="At least two corpora on one node. A weight that is left out is 1."
        ),
    ],
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0)] = 0,
    max_documents: _MaxDocuments = 0,
    node: Annotated[str, typer.Option(metavar="NODE", help="Node that holds the corpora.")] = "",
) -> None:
    """Mix corpora by weight. The corpus of each document is drawn at random."""
    settings = settings_of(context)
    weights: dict[str, float] = {}
    for part in parts:
        part_id, _, weight = part.partition("=")
        if part_id in weights:
            raise typer.BadParameter(f"names the corpus {part_id} twice", param_hint="CORPUS=WEIGHT")
        try:
            weights[part_id] = float(weight or 1)
        except ValueError as exc:
            raise typer.BadParameter(f"{part!r} is not CORPUS=WEIGHT", param_hint="CORPUS=WEIGHT") from exc
    with settings.connect() as client:
        corpus = client.corpora.register_mix(corpus_id, weights, seed=seed, max_documents=max_documents, node=node)
    _print_corpus(settings, corpus)


@reported
def list_corpora(context: typer.Context, node: OnlyNode = "") -> None:
    """List corpora."""
    settings = settings_of(context)
    with settings.connect() as client:
        corpora = client.corpora.list(node=node)
    rows = [_row(corpus) for corpus in corpora]
    print_rows(settings, corpora, _COLUMNS, rows, empty="no corpora; add one with `headrace corpora add`")


@reported
def remove(
    context: typer.Context,
    corpus_id: CorpusId,
    node: Annotated[str, typer.Option(metavar="NODE", help="Node to delete it from.  (default: all nodes)")] = "",
) -> None:
    """Delete a corpus from all nodes, or from one. Activation sets made from it stay."""
    settings = settings_of(context)
    with settings.connect() as client:
        nodes = [each for each in client.corpora.delete(corpus_id, node=node) if each]
    where = f" from {', '.join(nodes)}" if nodes else ""
    print_done(settings, {"deleted": corpus_id, "nodes": nodes}, f"deleted {corpus_id}{where}")


def _print_corpus(settings: Settings, corpus: Corpus) -> None:
    facts = facts_of(_COLUMNS, _row(corpus)) | {"digest": corpus.digest}
    print_value(settings, corpus, facts)


_COLUMNS = (
    Column("id"),
    Column("node", 2),
    Column("documents", 1),
    Column("size", 3),
    Column("kind", 4),
    Column("origin", 6),
    Column("added", 5),
)


def _row(corpus: Corpus) -> tuple[str, ...]:
    return (
        corpus.id,
        corpus.node_id,
        formats.count(corpus.n_documents),
        formats.size(corpus.size_bytes),
        "token ids" if corpus.tokenized else "chat" if corpus.chat else "text",
        corpus.origin,
        formats.local_time(corpus.create_time),
    )
