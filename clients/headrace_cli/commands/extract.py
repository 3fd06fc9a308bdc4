"""`headrace extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.commands.extractions import follow, print_extraction
from headrace_cli.commands.options import CorpusId, ModelId
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import print_value
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client.values import Estimate


_Hookpoints = Annotated[
    list[str],
    typer.Option(
        "--hookpoint",
        "-h",
        metavar="NAME",
        help="Hookpoint to capture, such as blocks.14.hook_resid_post or blocks.4-7.*; may be repeated.",
    ),
]
_ContextSize = Annotated[int, typer.Option(metavar="N", help="Tokens in one sequence.")]
_BatchSize = Annotated[int, typer.Option(metavar="N", help="Sequences in one forward pass.")]
_Packing = Annotated[str, typer.Option(help="packed: as many documents in a sequence as fit; or one_document.")]
_AttendAcross = Annotated[
    bool, typer.Option("--attend-across-documents", help="Let packed documents attend to one another.")
]
_Bos = Annotated[
    str,
    typer.Option(
        help="Tokens around each document: tokenizer (those that the model's tokenizer puts around a text), document"
        " (BOS alone) or none."
    ),
]
_Eos = Annotated[str, typer.Option(help="End-of-sequence token: document (after each document) or none.")]
_DropSpecial = Annotated[bool, typer.Option("--drop-special-tokens", help="Leave out the rows of special tokens.")]
_DropFirst = Annotated[int, typer.Option(metavar="N", help="Leave out the rows of each document's first N positions.")]
_LongDocuments = Annotated[
    str,
    typer.Option(
        help="Documents longer than a sequence: split or truncate.  (default: split when packed, else truncate)"
    ),
]
_TokenWindow = Annotated[
    str,
    typer.Option(
        metavar="START:END", help="Keep only the rows of these positions of each document; `-1:` is the last one."
    ),
]
_ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Documents are conversations: apply the tokenizer's chat template.")
]
_MaxDocuments = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Only the first N documents of the corpus; another set; 0: all."),
]
_Dtype = Annotated[str, typer.Option(help="Stored dtype: float32, float16, bfloat16, float8_e4m3 or int8.")]
_MaxRows = Annotated[int, typer.Option(metavar="N", help="Largest number of rows; 0: the whole corpus.")]
_Window = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Keep a window of SIZE (256MiB) on disk instead of all rows; the extraction waits for its readers.",
    ),
]
_SkipBad = Annotated[
    bool, typer.Option("--skip-bad-documents", help="Leave out documents that can't be tokenized, and count them.")
]
_AllowNonFinite = Annotated[
    bool, typer.Option("--allow-non-finite", help="Keep NaN and infinite values instead of failing.")
]
_Node = Annotated[str, typer.Option(metavar="NODE", help="Node to run on.  (default: one that holds the corpus)")]
_Estimate = Annotated[bool, typer.Option("--estimate", help="Only estimate rows, bytes and seconds; start nothing.")]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Show progress until the extraction ends.")]


@reported
def extract(
    context: typer.Context,
    *,
    model: ModelId,
    corpus: CorpusId,
    hookpoint: _Hookpoints,
    context_size: _ContextSize = 256,
    batch_size: _BatchSize = 4,
    packing: _Packing = "packed",
    attend_across_documents: _AttendAcross = False,
    bos: _Bos = "tokenizer",
    eos: _Eos = "none",
    drop_special_tokens: _DropSpecial = False,
    drop_first_positions: _DropFirst = 0,
    long_documents: _LongDocuments = "",
    token_window: _TokenWindow = "",
    chat_template: _ChatTemplate = False,
    skip_bad_documents: _SkipBad = False,
    max_documents: _MaxDocuments = 0,
    dtype: _Dtype = "float32",
    max_rows: _MaxRows = 0,
    window: _Window = "",
    allow_non_finite: _AllowNonFinite = False,
    node: _Node = "",
    estimate: _Estimate = False,
    wait: _Wait = True,
) -> None:
    """Run a corpus through a model and keep the activations."""
    from headrace_client import Recipe, Retain, TokenWindow, Window  # noqa: PLC0415

    settings = settings_of(context)
    fields: dict[str, Any] = {  # Recipe checks the words; its error lists the valid ones.
        "context_size": context_size,
        "packing": packing,
        "attend_across_documents": attend_across_documents,
        "bos": bos,
        "eos": eos,
        "drop_special_tokens": drop_special_tokens,
        "drop_first_positions": drop_first_positions,
        "batch_size": batch_size,
        "storage_dtype": dtype,
        "long_documents": long_documents or None,
        "window": TokenWindow.parse(token_window) if token_window else None,
        "chat_template": chat_template,
        "skip_bad_documents": skip_bad_documents,
        "max_documents": max_documents,
    }
    try:
        retention = Window(window_bytes=formats.parse_size(window)) if window else Retain()
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--window") from exc
    job: dict[str, Any] = {"recipe": Recipe(**fields), "retention": retention, "max_rows": max_rows, "node": node}
    with settings.connect() as client:
        if estimate:
            _print_estimate(settings, client.extractions.estimate(model, corpus, hookpoint, **job))
            return
        extraction = client.extractions.start(model, corpus, hookpoint, allow_non_finite=allow_non_finite, **job)
        if wait:
            extraction = follow(client, extraction.id)
    print_extraction(settings, extraction)


def _print_estimate(settings: Settings, counted: Estimate) -> None:
    facts = {
        "rows": formats.count(counted.n_rows),
        "cached": formats.count(counted.n_rows_cached),
        "tokens": formats.count(counted.n_tokens),
        "size": formats.size(counted.size_bytes),
        "to write": "unknown" if counted.new_bytes is None else formats.size(counted.new_bytes),
        "available": "unknown" if counted.available_bytes is None else formats.size(counted.available_bytes),
        "time": "unknown until the model has run once"
        if counted.seconds is None
        else formats.duration(counted.seconds),
    }
    print_value(settings, counted, facts)
