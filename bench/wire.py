"""Inline replay of a sealed set over loopback, against other ways to move the same bytes between two processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.figures import Figure, compare
from bench.interleave import interleave
from bench.processes import Worker, cpu_s, server
from bench.replay import ReplaySet, make_replay_set

SET_BYTES = 1_500_000_000
PASS_DEADLINE_S = 120.0
KINDS = ("headrace", "generated", "flight", "tcp")
TARGETS = {"generated": 2.5, "flight": 1.2, "tcp": 0.3}


def measure(work_dir: Path, console: Console, *, rounds: int, set_bytes: int = SET_BYTES) -> list[Figure]:
    """Returns one figure per contender; bytes per second, Headrace's first."""
    console.print(f"wire: writing a set of {set_bytes / 1e9:.2f} GB")
    replay = make_replay_set(work_dir / "data", set_bytes)
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    checksums: set[int] = set()
    with ExitStack() as stack:
        sides = {
            kind: _side(stack, kind, replay, work_dir, on_pass=lambda a, c, kind=kind: _keep(cpu[kind], checksums, a, c))
            for kind in KINDS
        }
        console.print(f"wire: {', '.join(KINDS)} in turns, {rounds} rounds of {replay.size_bytes / 1e9:.2f} GB each")
        rates = interleave(sides, rounds)
    assert len(checksums) == 1, "the clients did not receive the same bytes"
    for kind in KINDS:
        console.print(
            f"  {kind:10} {median(rates[kind]) / 1e6:6,.0f} MB/s "
            f"({min(rates[kind]) / 1e6:,.0f} to {max(rates[kind]) / 1e6:,.0f}), "
            f"{median(cpu[kind]):.2f} s of CPU a GB, server and client together"
        )
    in_mb = {kind: [rate / 1e6 for rate in rates[kind]] for kind in KINDS}
    return [
        compare(f"wire: replay against {kind}", in_mb["headrace"], in_mb[kind], target=target, unit="MB/s")
        for kind, target in TARGETS.items()
    ]


def extractor_arguments(replay: ReplaySet) -> list[str]:
    """Flags of an extractor that replays a finished extraction: it needs no registry for that."""
    # Port 9 (discard) refuses connections; the extractor goes on asking once a second.
    return ["--listen", "127.0.0.1:0", "--registry", "127.0.0.1:9", "--data-dir", str(replay.data_dir)]


def _side(
    stack: ExitStack,
    kind: str,
    replay: ReplaySet,
    work_dir: Path,
    *,
    on_pass: Callable[[dict[str, Any], float], None],
) -> Callable[[], float]:
    """Starts server and client of one contender; the function returned streams the set once."""
    if kind == "headrace":
        started = server("extractor_service", extractor_arguments(replay), work_dir=work_dir)
    else:
        started = server(
            "bench.wire_servers", [kind, "--folder", str(replay.folder), "--rows", str(replay.n_rows)], work_dir=work_dir
        )
    address, server_pid = stack.enter_context(started)
    sizes = [str(replay.size_bytes), str(replay.chunk_bytes)]
    client = stack.enter_context(Worker("bench.wire_clients", [kind, address, *sizes]))

    def stream_once() -> float:
        before = cpu_s(server_pid) + cpu_s(client.pid)
        result = client.ask({}, deadline_s=PASS_DEADLINE_S)
        on_pass(result, cpu_s(server_pid) + cpu_s(client.pid) - before)
        assert result["n_bytes"] == replay.size_bytes, f"{kind} received {result['n_bytes']} bytes"
        return float(result["n_bytes"] / result["seconds"])

    return stream_once


def _keep(cpu: list[float], checksums: set[int], result: dict[str, Any], seconds: float) -> None:
    cpu.append(seconds / (result["n_bytes"] / 1e9))
    checksums.add(result["checksum"])
