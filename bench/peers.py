"""Rows per second delivered to another process, against the rows that peers compute in their own process.

SmolLM2-135M, layer 14, float32, the same text. Long documents are contexts of 256 tokens, four a batch, not padded.
Paragraphs are padded, 32 a batch, by the peers that pad; SAELens joins them to contexts instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from bench.end_to_end import PASS_DEADLINE_S, Services, start_services
from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.peer_sources import contexts
from bench.processes import ROOT, Worker
from bench.text import CONTEXT_SIZE, paragraphs

PEERS = ("sae_lens", "transformer_lens", "nnsight", "full")
PADDING = ("transformer_lens", "nnsight", "full")
# Its published version needs older packages than the other sides: see the README.
DICTIONARY_LEARNING = "dictionary_learning"
_ITS_PYTHON = ROOT / ".venv-bench-dictionary-learning" / "bin" / "python"
_N_ROWS = 32_768
_AT_MOST_S = 25.0


def measure(work_dir: Path, console: Console, *, rounds: int) -> list[Figure]:
    """Returns a figure for each peer and kind of text; rows per second, Headrace's first."""
    figures: list[Figure] = []
    with ExitStack() as stack:
        console.print("peers: starting services, converting the model")
        services = start_services(stack, work_dir)
        workers = {
            side: stack.enter_context(Worker("bench.peer_sources", [side, services.registry, services.files_path]))
            for side in ("headrace", *PEERS)
        }
        more: tuple[str, ...] = ()
        if _ITS_PYTHON.exists():
            its_own = Worker("bench.dictionary_learning_source", [services.files_path], python=_ITS_PYTHON)
            workers[DICTIONARY_LEARNING], more = stack.enter_context(its_own), (DICTIONARY_LEARNING,)
        for kind, peers, target in (("long", (*PEERS, *more), 1.0), ("short", (*PADDING, *more), 2.0)):
            corpora = _upload(services, kind, rounds, work_dir)
            sides = {peer: partial(_turn, workers[peer], kind, repeat("")) for peer in peers}
            sides = {"headrace": partial(_turn, workers["headrace"], kind, corpora)} | sides
            for turn in sides.values():
                turn()  # Models are loaded and kernels chosen.
            console.print(f"peers: {kind} documents, {rounds} rounds of at most {_N_ROWS:,} rows")
            rates = interleave(sides, rounds)
            for side, values in rates.items():
                console.print(f"  {side:18} {median(values):6,.0f} rows/s")
            figures += [
                compare(f"rows vs {peer}, {kind}", rates["headrace"], rates[peer], target=target, unit="rows/s")
                for peer in peers
            ]
    return figures


def _upload(services: Services, kind: str, rounds: int, folder: Path) -> Iterator[str]:
    """Uploads a corpus for each turn of Headrace, so that nothing is cached; returns an iterator of their ids.

    For `long`, the documents are the same contexts that the peers get, as token ids.
    """
    ids = [f"{kind}-{number}" for number in range(rounds + 1)]
    token_ids = np.stack([row.numpy() for batch in contexts(services.files_path) for row in batch]).astype(np.int32)
    for number, corpus_id in enumerate(ids):
        if kind == "short":
            services.client.corpora.upload(corpus_id, documents=[*paragraphs(), f"Turn {number}."])
            continue
        file = folder / f"{corpus_id}.npy"
        np.save(file, np.concatenate([token_ids, np.full((1, CONTEXT_SIZE), number, np.int32)]))
        services.client.corpora.upload(corpus_id, file)
    return iter(ids)


def _turn(worker: Worker, kind: str, corpora: Iterator[str]) -> float:
    question = {"kind": kind, "n_rows": _N_ROWS, "corpus_id": next(corpora), "at_most_s": _AT_MOST_S}
    result = worker.ask(question, deadline_s=PASS_DEADLINE_S)
    return float(result["n_rows"] / result["seconds"])
