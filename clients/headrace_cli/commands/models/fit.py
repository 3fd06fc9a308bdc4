"""`headrace fit`: the memory a model takes in each form, and where it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.commands.options import ModelId
from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_json, print_rows
from headrace_cli.output.tables import Column
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.values import MemoryAdvice, MemoryEstimate

# A device on which the model never fits is not shown.
_FITS = {
    "RESIDENT": "{place} (resident)",
    "FREE": "{place}",
    "AFTER_EVICTION": "{place} (after eviction)",
    "BUSY": "{place} (busy)",
}

_COLUMNS = (
    Column("form"),
    Column("weights", 5),
    Column("overhead", 6),
    Column("total"),
    Column("fits on", 1, prose=True),
    Column("evicts", 4, prose=True),
    Column("batch up to", 3),
    Column("advice", 2),
)


@reported
def fit(
    context: typer.Context,
    *,
    model_id: ModelId,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Sequences in one forward pass.")] = 1,
    context_size: Annotated[int, typer.Option("--context", metavar="N", min=1, help="Tokens in one sequence.")] = 1024,
    hookpoints: Annotated[
        int, typer.Option("--hookpoints", metavar="N", min=1, help="Hookpoints that are captured.")
    ] = 1,
) -> None:
    """Show how much memory a model takes and where it fits. The model's files need not be fetched yet.

    One line for each form (dtype or quantization), with the models that would be evicted for it.
    """
    settings = settings_of(context)
    with settings.connect(deadline_s=60.0) as client:
        advice = client.models.estimate(model_id, batch_size=batch, context_size=context_size, n_hookpoints=hookpoints)
    if settings.json:
        print_json(advice)
        return
    print_rows(settings, advice.estimates, _COLUMNS, [_row(advice, each) for each in advice.estimates], empty="")
    if advice.recommended is None:
        note("no form has room on a living node now; see `headrace devices`")


def form_name(quantization: str, dtype: str) -> str:
    """Returns the short name of a form: `bfloat16`, `int4`."""
    return dtype if quantization == "none" else quantization


def _row(advice: MemoryAdvice, estimate: MemoryEstimate) -> tuple[str, ...]:
    places = [
        _FITS[each.fit.value].format(place=f"{each.node_id}/{each.device_id}")
        for each in estimate.placements
        if each.fit.value in _FITS
    ]
    evicted = sorted({model for each in estimate.placements for model in each.evicted_model_ids})
    largest = max((each.max_batch_size for each in estimate.placements), default=0)
    return (
        form_name(estimate.quantization.value, estimate.dtype),
        formats.size(estimate.weight_bytes),
        formats.size(estimate.overhead_bytes),
        formats.size(estimate.total_bytes) + (" measured" if estimate.measured else ""),
        ", ".join(places) or "nowhere",
        ", ".join(evicted),
        formats.count(largest) if largest else "",
        "recommended" if estimate is advice.recommended else "",
    )
