"""Batches of tensors from a sealed set: mapped against inline and a plain copy, shuffled against in sequence."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.processes import Worker, server
from bench.replay import make_replay_set
from bench.wire import extractor_arguments

SET_BYTES = 1_000_000_000
PASS_DEADLINE_S = 120.0
SIDES = ("mapped", "inline", "copy", "mapped shuffled", "inline shuffled")
TARGETS = (
    ("mapped rows vs messages", "mapped", "inline", 5.0),
    ("mapped rows vs a plain copy", "mapped", "copy", 0.5),
    ("shuffled vs in sequence, mapped", "mapped shuffled", "mapped", 0.8),
    ("shuffled vs in sequence, messages", "inline shuffled", "inline", 0.8),
)


def measure(work_dir: Path, console: Console, *, rounds: int, set_bytes: int = SET_BYTES) -> list[Figure]:
    """Returns one figure per comparison, in MB per second delivered as batches."""
    replay = make_replay_set(work_dir / "reading", set_bytes)
    console.print(f"reading: {', '.join(SIDES)} in turns, {rounds} rounds of {replay.size_bytes / 1e9:.2f} GB each")
    with ExitStack() as stack:
        address, _ = stack.enter_context(server("headrace_extractor", extractor_arguments(replay), work_dir=work_dir))
        worker = stack.enter_context(Worker("bench.reading_client", [address, str(replay.folder)]))
        sides = {side: partial(_read, worker, side, replay.n_rows) for side in SIDES}
        for side in sides.values():
            side()  # Connections, page cache and allocators warm up.
        passes = interleave(sides, rounds)
    assert len({done.checksum for values in passes.values() for done in values}) == 1, "not all read the same rows"
    rates = {side: [replay.size_bytes / done.seconds / 1e6 for done in values] for side, values in passes.items()}
    for side, values in rates.items():
        console.print(f"  {side:16} {median(values):6,.0f} MB/s ({min(values):,.0f} to {max(values):,.0f})")
    return [compare(name, rates[a], rates[b], target=target, unit="MB/s") for name, a, b, target in TARGETS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One reading of the whole set; `checksum` does not depend on the order of rows."""

    seconds: float
    checksum: int


def _read(worker: Worker, side: str, n_rows: int) -> Pass:
    result = worker.ask({"side": side}, deadline_s=PASS_DEADLINE_S)
    assert result["n_rows"] == n_rows, f"read {result['n_rows']} rows"
    return Pass(seconds=result["seconds"], checksum=result["checksum"])
