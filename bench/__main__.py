"""`python -m bench`: measures, prints a table, writes `.bench/latest.json`. A missed target is shown, not an error."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench import cold_load, depth, end_to_end, fan_out, peers, reading, registry, wire
from bench.figures import save, show
from bench.processes import ROOT

CHOICES = ("wire", "reading", "fan-out", "depth", "end-to-end", "peers", "registry", "cold-load", "same-loss")


def main() -> int:
    """Runs the benchmarks asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=CHOICES, help="default: all but cold-load and same-loss")
    parser.add_argument("--rounds", type=int, default=7, help="turns of the wire and reading benchmarks (default 7)")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench" / "latest.json")
    parser.add_argument("--work-dir", type=Path, help="folder for 3 GB of data meanwhile (default: a temporary one)")
    parser.add_argument(
        "--rows-rounds", type=int, default=3, help="turns of fan-out, depth, end-to-end and peers (default 3)"
    )
    parser.add_argument("--rows-seconds", type=float, default=12.0, help="length of such a turn (default 12)")
    parser.add_argument("--registry-rounds", type=int, default=5, help="turns of registry and cold-load (default 5)")
    parser.add_argument(
        "--contexts", type=int, default=128, help="of 256 rows, to train on for same-loss (default 128)"
    )
    args = parser.parse_args()
    console, figures = Console(), []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=args.work_dir) as folder:
        if args.only in (None, "wire"):
            figures += wire.measure(Path(folder), console, rounds=args.rounds)
        if args.only in (None, "reading"):
            figures += reading.measure(Path(folder), console, rounds=args.rounds)
        if args.only in (None, "fan-out"):
            figures += fan_out.measure(Path(folder), console, rounds=args.rows_rounds)
        if args.only in (None, "depth"):
            figures += depth.measure(Path(folder), console, rounds=args.rows_rounds)
        if args.only in (None, "end-to-end"):
            figures += end_to_end.measure(Path(folder), console, rounds=args.rows_rounds, seconds=args.rows_seconds)
        if args.only in (None, "peers"):
            figures += peers.measure(Path(folder), console, rounds=args.rows_rounds)
        if args.only in (None, "registry"):
            figures += registry.measure(Path(folder), console, rounds=args.registry_rounds)
        if args.only == "cold-load":
            figures += cold_load.measure(Path(folder), console, rounds=args.registry_rounds)
        if args.only == "same-loss":
            from bench import same_loss  # noqa: PLC0415 -- torch and SAELens

            figures += same_loss.measure(Path(folder), console, n_contexts=args.contexts)
    show(figures, console)
    save(figures, args.output)
    console.print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
