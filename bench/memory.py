"""`python -m bench.memory`: the extractor's memory stays flat while a trainer reads 5 GB through it.

Streams a set several times over, samples the server's resident memory meanwhile, and exits with 1 if it grew by more
than the limit after the first pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from bench import wire
from bench.processes import Worker, rss_bytes, server
from bench.replay import make_replay_set

SET_BYTES = 1_250_000_000
N_PASSES = 4  # 5 GB, after one pass that warms up.
LIMIT_BYTES = 64 * 1024 * 1024
SAMPLE_S = 0.02
FIELDS = ("VmRSS", "RssAnon", "RssFile")


class Sampler:
    """Memory of a process, sampled in a thread."""

    def __init__(self, pid: int) -> None:
        self.samples: list[dict[str, int]] = []
        self._pid = pid
        self._stopping = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Samples while the block runs."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def extent(self, field: str) -> tuple[int, int]:
        """Returns the smallest and the largest sample, in bytes."""
        values = [sample[field] for sample in self.samples]
        return min(values), max(values)

    def _run(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            self.samples.append({field: rss_bytes(self._pid, field) for field in FIELDS})


def measure(work_dir: Path, console: Console) -> bool:
    """Streams the set while sampling; returns whether the memory stayed flat."""
    console.print(f"memory: writing a set of {SET_BYTES / 1e9:.2f} GB")
    replay = make_replay_set(work_dir / "data", SET_BYTES)
    sizes = [str(replay.size_bytes), str(replay.chunk_bytes)]
    with (
        server("headrace_extractor", wire.extractor_arguments(replay), work_dir=work_dir) as (address, pid),
        Worker("bench.wire_clients", ["headrace", address, *sizes]) as client,
    ):
        client.ask({}, deadline_s=wire.PASS_DEADLINE_S)
        sampler, streamed = Sampler(pid), 0
        start = rss_bytes(pid)
        with sampler.running():
            for _ in range(N_PASSES):
                streamed += client.ask({}, deadline_s=wire.PASS_DEADLINE_S)["n_bytes"]
    console.print(f"memory: {streamed / 1e9:.2f} GB streamed, {len(sampler.samples)} samples; before: {_mib(start)}")
    for field in FIELDS:
        low, high = sampler.extent(field)
        console.print(f"  {field:8} {_mib(low)} to {_mib(high)}, a span of {_mib(high - low)}")
    growth = sampler.extent("VmRSS")[1] - min(start, sampler.extent("VmRSS")[0])
    flat = growth <= LIMIT_BYTES
    verdict = "[green]flat[/green]" if flat else "[bold red]NOT flat[/bold red]"
    console.print(f"memory: {verdict}: grew by {_mib(growth)}, allowed are {_mib(LIMIT_BYTES)}")
    return flat


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"


def main() -> int:
    """Returns 0 if the memory stayed flat."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--work-dir", type=Path, help="folder for the set, 1.3 GB (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=args.work_dir) as folder:
        return 0 if measure(Path(folder), Console()) else 1


if __name__ == "__main__":
    sys.exit(main())
