"""`headrace extractions`, of which `watch` and `cancel` are commands of their own too."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ExtractionId, OnlyModel, OnlyNode
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.progress import Bar, show_extraction
from headrace_cli.output.results import note, print_done, print_json, print_rows, print_value
from headrace_cli.output.tables import Column
from headrace_cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import Extraction

_CANCEL_WAIT_S = 15.0  # A forward pass under way ends first.
_COLUMNS = (
    Column("extraction"),
    Column("state"),
    Column("model", 1),
    Column("corpus", 2),
    Column("rows", 3),
    Column("size", 5),
    Column("hookpoints", 7),
    Column("set", 6),
    Column("node", 8),
    Column("started", 4),
)


@reported
def list_extractions(
    context: typer.Context,
    *,
    node: OnlyNode = "",
    model: OnlyModel = "",
    active: Annotated[bool, typer.Option("--active", help="List only extractions that have not ended.")] = False,
) -> None:
    """List extractions, node by node, the newest first."""
    settings, now = settings_of(context), datetime.now(UTC)
    with settings.connect() as client:
        found = [
            extraction
            for extraction in client.extractions.list(node=node)
            if model in ("", extraction.model_id) and not (active and extraction.ended)
        ]
    rows = [
        (
            extraction.id,
            extraction.state.value,
            extraction.model_id,
            extraction.corpus_id,
            f"{formats.count(extraction.n_rows)}{_of_expected(extraction)}",
            formats.size(extraction.size_bytes),
            # The first, and how many more: there may be hundreds.
            ", ".join([*extraction.hookpoints[:1], *(f"{n} more" for n in [len(extraction.hookpoints) - 1] if n)]),
            extraction.set_id[:16],
            extraction.node_id,
            formats.ago(extraction.create_time, now),
        )
        for extraction in found
    ]
    print_rows(settings, found, _COLUMNS, rows, empty="no extractions; start one with `headrace extract`")


@reported
def show(context: typer.Context, extraction_id: ExtractionId) -> None:
    """Show an extraction."""
    settings = settings_of(context)
    with settings.connect() as client:
        extraction = client.extractions.get(extraction_id)
    print_extraction(settings, extraction)


@reported
def watch(
    context: typer.Context,
    *,
    extraction_id: ExtractionId,
    wait_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest time to watch.  (default: until it ends)")
    ] = None,
) -> None:
    """Watch an extraction until it ends. With --json, one event a line."""
    settings = settings_of(context)
    with settings.connect() as client:
        if settings.json:
            client.extractions.wait(extraction_id, print_json, deadline_s=wait_s)
        else:
            print_extraction(settings, follow(client, extraction_id, wait_s))


@reported
def cancel(context: typer.Context, extraction_id: ExtractionId) -> None:
    """Stop an extraction. Its rows so far are kept, except those of a window."""
    from headrace_client.values import Window  # noqa: PLC0415

    settings = settings_of(context)
    with settings.connect() as client:
        before = client.extractions.get(extraction_id)
        extraction = before if before.ended else _until_ended(client, client.extractions.cancel(extraction_id))
    state = extraction.state.lower()
    if before.ended or (extraction.ended and extraction.state != "CANCELLED"):
        text = f"nothing to cancel: {extraction_id} is {state}"
    elif extraction.ended and isinstance(extraction.retention, Window):
        text = f"cancelled {extraction_id} at row {formats.count(extraction.n_rows)}; rows of a window are not kept"
    elif extraction.ended:
        kept = f"its {formats.things(extraction.n_rows, 'row')} stay in the set {extraction.set_id[:16]}"
        text = f"cancelled {extraction_id}; {kept}"
    else:
        text = f"{extraction_id} is still {state}: it ends after its present forward pass"
    print_done(settings, extraction, text)


def _until_ended(client: HeadraceClient, extraction: Extraction) -> Extraction:
    """Returns the extraction once it has ended, or as it is when that takes too long."""
    from headrace_client.errors import DeadlineExceeded  # noqa: PLC0415

    try:
        for event in client.extractions.watch(extraction.id, deadline_s=_CANCEL_WAIT_S):
            extraction = event.extraction
            if extraction.ended:
                break
    except DeadlineExceeded:
        pass
    return extraction


def follow(client: HeadraceClient, extraction_id: str, wait_s: float | None = None) -> Extraction:
    """Shows progress until an extraction has ended. Raises its error unless it is DONE."""
    try:
        with Bar(extraction_id) as bar:
            return client.extractions.wait(extraction_id, lambda now: show_extraction(bar, now), deadline_s=wait_s)
    except KeyboardInterrupt:
        note(
            f"the extraction goes on; watch it: `headrace watch {extraction_id}`, "
            f"or stop it: `headrace cancel {extraction_id}`"
        )
        raise


def print_extraction(settings: Settings, extraction: Extraction) -> None:
    """Prints all that is known of an extraction."""
    parity = ""
    if (receipt := extraction.receipt) is not None:
        worst, cosine = receipt.worst, min(column.min_cosine for column in receipt.columns)
        parity = (
            f"{formats.things(receipt.n_rows, 'row')} a column compared with transformers: "
            f"at most {worst.max_relative_error:.1e} off, cosine at least {cosine:.6f} ({worst.name})"
        )
    facts = {
        "extraction": extraction.id,
        "state": extraction.state.value,
        "failure": f"{extraction.failure.reason}: {extraction.failure.message}" if extraction.failure else "",
        "model": extraction.model_id,
        "corpus": extraction.corpus_id,
        "hookpoints": ", ".join(extraction.hookpoints),
        "set": extraction.set_id,
        "node": extraction.node_id,
        "rows": formats.count(extraction.n_rows),
        "computed": "none, all cached" if extraction.cached else formats.count(extraction.n_rows_computed),
        "size": formats.size(extraction.size_bytes),
        "parity": parity,
        "path": extraction.path,
    }
    print_value(settings, extraction, facts)


def _of_expected(extraction: Extraction) -> str:
    """Tells of how many rows an extraction has its rows while they grow; empty once it has ended."""
    known = extraction.n_rows_expected if not extraction.ended else None
    return f" of {formats.count(known)}" if known else ""
