"""Inline replay of a sealed set over loopback, against other ways to move the same bytes between two processes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.processes import Worker, cpu_s, server
from bench.replay import ReplaySet, make_replay_set

SET_BYTES = 1_500_000_000
PASS_DEADLINE_S = 120.0
KINDS = ("headrace", "generated", "flight", "tcp")
TARGETS = (("generated", "generated stubs", 2.5), ("flight", "Arrow Flight", 1.2), ("tcp", "raw TCP", 0.3))


def measure(work_dir: Path, console: Console, *, rounds: int, set_bytes: int = SET_BYTES) -> list[Figure]:
    """Returns one figure per contender, in MB per second; Headrace is the first side."""
    console.print(f"wire: writing a set of {set_bytes / 1e9:.2f} GB")
    replay = make_replay_set(work_dir / "data", set_bytes)
    with ExitStack() as stack:
        sides = {kind: Side(stack, kind, replay, work_dir) for kind in KINDS}
        console.print(f"wire: {', '.join(KINDS)} in turns, {rounds} rounds of {replay.size_bytes / 1e9:.2f} GB each")
        for side in sides.values():
            side.stream_once()  # Connections, page cache and allocators warm up.
        passes = interleave({kind: side.stream_once for kind, side in sides.items()}, rounds)
    assert len({done.checksum for values in passes.values() for done in values}) == 1, "not all received the same bytes"
    rates = {kind: [done.mb_per_s for done in values] for kind, values in passes.items()}
    for kind, values in rates.items():
        cpu = median(done.cpu_s_per_gb for done in passes[kind])
        console.print(
            f"  {kind:10} {median(values):6,.0f} MB/s ({min(values):,.0f} to {max(values):,.0f}), "
            f"{cpu:.2f} s of CPU a GB"
        )
    return [
        compare(f"wire vs {name}", rates["headrace"], rates[kind], target=target, unit="MB/s")
        for kind, name, target in TARGETS
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One stream of the whole set; CPU seconds are those of server and client together."""

    mb_per_s: float
    cpu_s_per_gb: float
    checksum: int


class Side:
    """Server and client of one contender; both run for as long as `stack` is open."""

    def __init__(self, stack: ExitStack, kind: str, replay: ReplaySet, work_dir: Path) -> None:
        module = "headrace_extractor" if kind == "headrace" else "bench.wire_servers"
        arguments = [kind, "--folder", str(replay.folder), "--rows", str(replay.n_rows)]
        arguments = extractor_arguments(replay) if kind == "headrace" else arguments
        address, self._server_pid = stack.enter_context(server(module, arguments, work_dir=work_dir))
        sizes = [str(replay.size_bytes), str(replay.chunk_bytes)]
        self._client = stack.enter_context(Worker("bench.wire_clients", [kind, address, *sizes]))
        self._size_bytes = replay.size_bytes

    def stream_once(self) -> Pass:
        """Streams the whole set."""
        before = self._cpu_s()
        result = self._client.ask({}, deadline_s=PASS_DEADLINE_S)
        assert result["n_bytes"] == self._size_bytes, f"received {result['n_bytes']} bytes"
        return Pass(
            mb_per_s=result["n_bytes"] / result["seconds"] / 1e6,
            cpu_s_per_gb=(self._cpu_s() - before) / (result["n_bytes"] / 1e9),
            checksum=result["checksum"],
        )

    def _cpu_s(self) -> float:
        return cpu_s(self._server_pid) + cpu_s(self._client.pid)


def extractor_arguments(replay: ReplaySet) -> list[str]:
    """Returns the flags of an extractor that replays a finished extraction, which needs no registry."""
    # Port 9 (discard) refuses connections; the extractor tries again once a second.
    flags = ["--listen", "127.0.0.1:0", "--registry", "127.0.0.1:9", "--data-dir", str(replay.data_dir)]
    return [*flags, "--spare-runners", "0"]  # Nothing is loaded.
