"""`headrace fit`: what a model takes in each form, and where it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace_cli.exits import reported
from headrace_cli.output import formats
from headrace_cli.output.results import note, print_json, print_rows
from headrace_cli.settings import settings_of

if TYPE_CHECKING:
    from headrace_client.memory import MemoryAdvice, MemoryEstimate, Placement

_WORDS = {
    "RESIDENT": "{place} (is there)",
    "FREE": "{place}",
    "AFTER_EVICTION": "{place} (after eviction)",
    "BUSY": "{place} (busy)",
}


@reported
def fit(
    context: typer.Context,
    *,
    model_id: Annotated[str, typer.Argument(metavar="MODEL", help="A registered model; it need not be ready.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in one forward pass.")] = 1,
    context_size: Annotated[int, typer.Option("--context", min=1, help="Tokens in one sequence.")] = 1024,
    hookpoints: Annotated[int, typer.Option("--hookpoints", min=1, help="Captured hookpoints.")] = 1,
) -> None:
    """Show what memory a model takes in each form, where it fits, and what would be evicted for it."""
    settings = settings_of(context)
    with settings.connect(deadline_s=60.0) as client:
        advice = client.models.estimate(model_id, batch_size=batch, context_size=context_size, n_hookpoints=hookpoints)
    if settings.json:
        print_json(advice)
        return
    headings = ("form", "weights", "overhead", "total", "fits on", "evicts", "batch up to", "")
    print_rows(settings, advice.estimates, headings, [_row(advice, each) for each in advice.estimates], empty="")
    if advice.recommended is None:
        note("no form has room on a living node now; see `headrace devices`")


def _row(advice: MemoryAdvice, estimate: MemoryEstimate) -> tuple[str, ...]:
    places = [text for text in map(_place, estimate.placements) if text]
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


def _place(placement: Placement) -> str:
    words = _WORDS.get(placement.fit.value, "")
    return words.format(place=f"{placement.node_id}/{placement.device_id}")


def form_name(quantization: str, dtype: str) -> str:
    """How people call a form: `bfloat16`, `int4`."""
    return dtype if quantization == "none" else quantization
