"""`headrace extract`, `watch` and `cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.progress import Bar, show_extraction
from headrace_cli.output.results import note, print_json, print_value
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient, Recipe, TokenWindow
    from headrace_client.values import Estimate, Extraction, Retention


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the tree."""
    app.command("extract")(extract)
    app.command("watch")(watch)
    app.command("cancel")(cancel)


@reported
def extract(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    corpus: Annotated[str, typer.Argument(metavar="CORPUS")],
    hookpoint: Annotated[
        list[str],
        typer.Option("--hookpoint", "-h", help="Such as blocks.14.hook_resid_post or blocks.4-7.*; repeat."),
    ],
    context_size: Annotated[int, typer.Option(help="Tokens in one sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 4,
    packing: Annotated[str, typer.Option(help="packed or one_document.")] = "packed",
    attend_across_documents: Annotated[
        bool, typer.Option("--attend-across-documents", help="Packed documents see one another.")
    ] = False,
    bos: Annotated[str, typer.Option(help="Beginning-of-sequence token: document or none.")] = "document",
    eos: Annotated[str, typer.Option(help="End-of-sequence token: document or none.")] = "none",
    drop_special_tokens: Annotated[bool, typer.Option("--drop-special-tokens", help="No rows for them.")] = False,
    drop_first_positions: Annotated[int, typer.Option(help="No rows for a document's first so many positions.")] = 0,
    long_documents: Annotated[
        str, typer.Option(help="split or truncate.  (default: split when packed, else truncate)")
    ] = "",
    token_window: Annotated[
        str, typer.Option(metavar="START:END", help="Rows only for these positions of each document; -1: is the last.")
    ] = "",
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Documents are conversations; use the tokenizer's chat template.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Stored dtype: float32, float16, bfloat16, float8_e4m3 or int8.")
    ] = "float32",
    max_rows: Annotated[int, typer.Option(help="Stop after so many rows; 0: the whole corpus.")] = 0,
    window: Annotated[
        str, typer.Option(metavar="BYTES", help="Keep a window of so many bytes (256MiB) instead of all rows.")
    ] = "",
    allow_non_finite: Annotated[bool, typer.Option("--allow-non-finite", help="Keep NaN and infinite values.")] = False,
    node: Annotated[str, typer.Option(help="Node to run on.")] = "",
    estimate: Annotated[bool, typer.Option("--estimate", help="Only count rows, bytes and seconds.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show progress until it ends.")] = True,
) -> None:
    """Run a corpus through a model and keep what passes its hookpoints."""
    settings = settings_of(context)
    recipe = _recipe(
        context_size=context_size,
        packing=packing,
        attend_across_documents=attend_across_documents,
        bos=bos,
        eos=eos,
        drop_special_tokens=drop_special_tokens,
        drop_first_positions=drop_first_positions,
        batch_size=batch_size,
        storage_dtype=dtype,
        long_documents=long_documents or None,
        window=_token_window(token_window),
        chat_template=chat_template,
    )
    what: dict[str, Any] = {"recipe": recipe, "retention": _retention(window), "max_rows": max_rows, "node": node}
    with settings.connect() as client:
        if estimate:
            _print_estimate(settings, client.extractions.estimate(model, corpus, hookpoint, **what))
            return
        extraction = client.extractions.start(model, corpus, hookpoint, allow_non_finite=allow_non_finite, **what)
        if wait:
            extraction = _follow(client, extraction.id)
    _print_extraction(settings, extraction)


@reported
def watch(
    context: typer.Context,
    *,
    extraction_id: Annotated[str, typer.Argument(metavar="EXTRACTION")],
    wait_s: Annotated[float | None, typer.Option(help="Longest time to watch.  (default: until it ends)")] = None,
) -> None:
    """Watch an extraction until it ends; with --json one event a line."""
    settings = settings_of(context)
    with settings.connect() as client:
        if settings.json:
            client.extractions.wait(extraction_id, print_json, deadline_s=wait_s)
        else:
            _print_extraction(settings, _follow(client, extraction_id, wait_s))


@reported
def cancel(context: typer.Context, extraction_id: Annotated[str, typer.Argument(metavar="EXTRACTION")]) -> None:
    """Stop an extraction; rows so far stay."""
    settings = settings_of(context)
    with settings.connect() as client:
        _print_extraction(settings, client.extractions.cancel(extraction_id))


def _retention(window: str) -> Retention:
    from headrace_client import Retain, Window  # noqa: PLC0415

    if not window:
        return Retain()
    try:
        return Window(window_bytes=formats.parse_size(window))
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--window") from exc


def _follow(client: HeadraceClient, extraction_id: str, wait_s: float | None = None) -> Extraction:
    try:
        with Bar(extraction_id) as bar:
            return client.extractions.wait(extraction_id, lambda now: show_extraction(bar, now), deadline_s=wait_s)
    except KeyboardInterrupt:
        note(f"it goes on without you: `headrace watch {extraction_id}`, or end it: `headrace cancel {extraction_id}`")
        raise


def _token_window(text: str) -> TokenWindow | None:
    from headrace_client import TokenWindow  # noqa: PLC0415

    return TokenWindow.parse(text) if text else None


def _recipe(**fields: Any) -> Recipe:
    """Recipe takes plain words too, and names the ones it knows."""
    from headrace_client import Recipe  # noqa: PLC0415

    return Recipe(**fields)


def _print_estimate(settings: Settings, counted: Estimate) -> None:
    facts = {
        "rows": formats.count(counted.n_rows),
        "cached": formats.count(counted.n_rows_cached),
        "tokens": formats.count(counted.n_tokens),
        "size": formats.size(counted.size_bytes),
        "to write": "unknown" if counted.new_bytes is None else formats.size(counted.new_bytes),
        "room": "unknown" if counted.available_bytes is None else formats.size(counted.available_bytes),
        "time": "unknown until the model has run once"
        if counted.seconds is None
        else formats.duration(counted.seconds),
    }
    print_value(settings, counted, facts)


def _print_extraction(settings: Settings, extraction: Extraction) -> None:
    facts = {
        "extraction": extraction.id,
        "state": extraction.state.value,
        "failure": f"{extraction.failure.reason}: {extraction.failure.message}" if extraction.failure else "",
        "model": extraction.model_id,
        "corpus": extraction.corpus_id,
        "hookpoints": ", ".join(extraction.hookpoints),
        "set": extraction.set_id,
        "rows": formats.count(extraction.n_rows),
        "computed": "none, all cached" if extraction.cached else formats.count(extraction.n_rows_computed),
        "size": formats.size(extraction.size_bytes),
        "parity": _parity(extraction),
        "path": extraction.path,
    }
    print_value(settings, extraction, facts)


def _parity(extraction: Extraction) -> str:
    """What the receipt says, of its worst column."""
    if (receipt := extraction.receipt) is None:
        return ""
    worst = receipt.worst
    return (
        f"{receipt.n_rows} rows a column compared with transformers: at most {worst.max_relative_error:.1e} off, "
        f"cosine at least {min(column.min_cosine for column in receipt.columns):.6f} ({worst.name})"
    )
