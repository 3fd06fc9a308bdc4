"""Four trainers on four layers of one extraction, against the deepest layer alone and against a pass for each layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.end_to_end import MODEL_ID, start_services
from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.text import BATCH_SIZE, CONTEXT_SIZE, paragraphs
from headrace_client import HeadraceClient, Recipe

LAYERS = (5, 8, 11, 14)
N_ROWS = 8 * CONTEXT_SIZE * BATCH_SIZE


def measure(work_dir: Path, console: Console, *, rounds: int) -> list[Figure]:
    """Returns two figures, in rows of every layer per second; one pass for four trainers is the first side."""
    folder = work_dir / "fan-out"
    folder.mkdir()
    with ExitStack() as stack:
        console.print("fan-out: starting services, converting the model")
        client = start_services(stack, folder).client
        corpora = (upload(client, "fan-out", number) for number in count())
        hookpoints = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
        read(client, next(corpora), hookpoints)  # Loads the model.
        sides = {
            "four trainers": lambda: read(client, next(corpora), hookpoints),
            "deepest alone": lambda: read(client, next(corpora), hookpoints[-1:]),
            "four passes": lambda: sum(map(partial(_pass, client, next(corpora)), hookpoints)),
        }
        console.print(f"fan-out: {', '.join(sides)} in turns, {rounds} rounds of {N_ROWS:,} rows")
        rates = {name: [N_ROWS / took for took in values] for name, values in interleave(sides, rounds).items()}
    for name, values in rates.items():
        console.print(f"  {name:14} {median(values):6,.0f} rows/s ({min(values):,.0f} to {max(values):,.0f})")
    one = rates["four trainers"]
    return [
        compare("four trainers vs the deepest alone", one, rates["deepest alone"], target=0.91, unit="rows/s"),
        compare("four trainers vs four passes", one, rates["four passes"], target=2.0, unit="rows/s"),
    ]


def _pass(client: HeadraceClient, corpus_id: str, hookpoint: str) -> float:
    return read(client, corpus_id, [hookpoint])


def read(client: HeadraceClient, corpus_id: str, hookpoints: Sequence[str]) -> float:
    """Returns the seconds from the request for an extraction until a trainer for each hookpoint has its last batch."""
    recipe = Recipe(context_size=CONTEXT_SIZE, batch_size=BATCH_SIZE, bos="none")
    began = time.perf_counter()
    extraction = client.extractions.start(MODEL_ID, corpus_id, hookpoints, recipe=recipe, max_rows=N_ROWS)

    def train(hookpoint: str) -> int:
        with client.activations(extraction, columns=hookpoint, batch_size=1024) as batches:
            return sum(len(batch) for batch in batches)

    with ThreadPoolExecutor(len(hookpoints)) as pool:
        n_rows = list(pool.map(train, hookpoints))
    took = time.perf_counter() - began
    assert n_rows == [N_ROWS] * len(hookpoints), f"read {n_rows} rows"
    return took


def upload(client: HeadraceClient, name: str, number: int) -> str:
    """Uploads the same text and a last line of its own: another digest, so no row is cached. Returns the corpus id."""
    corpus_id = f"{name}-{number}"
    client.corpora.upload(corpus_id, documents=[*paragraphs(), f"Turn {number}."])
    return corpus_id
