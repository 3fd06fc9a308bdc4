"""Seconds per layer, by its depth, and for rows that exist already: from the request to the last row in the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

from rich.console import Console

from bench.end_to_end import start_services
from bench.fan_out import N_ROWS, read, upload
from bench.figures import Figure, compare
from bench.interleave import interleave
from headrace_client import HeadraceClient

LAYERS = (0, 4, 9, 14, 19, 24, 29)
_AGAIN = "layer 14 again"


def measure(work_dir: Path, console: Console, *, rounds: int) -> list[Figure]:
    """Returns one figure per layer, against the deepest, and one for cached rows; seconds for the same rows."""
    folder = work_dir / "depth"
    folder.mkdir()
    with ExitStack() as stack:
        console.print("depth: starting services, converting the model")
        client = start_services(stack, folder).client
        corpora = (upload(client, "depth", number) for number in count())
        kept = next(corpora)
        read(client, kept, [_hookpoint(14)])  # Loads the model.
        sides: dict[str, Callable[[], float]] = {
            f"layer {layer}": partial(_turn, client, corpora, layer) for layer in LAYERS
        }
        sides |= {_AGAIN: lambda: read(client, kept, [_hookpoint(14)])}
        console.print(f"depth: {', '.join(sides)} in turns, {rounds} rounds of {N_ROWS:,} rows")
        seconds = interleave(sides, rounds)
    deepest = f"layer {LAYERS[-1]}"
    figures = [
        compare(f"{name} of {LAYERS[-1] + 1} vs {deepest}", seconds[name], seconds[deepest], unit="s", sense="max")
        for name in sides
        if name not in (deepest, _AGAIN)
    ]
    recomputed = seconds["layer 14"]
    return [*figures, compare(f"{_AGAIN} vs computed", seconds[_AGAIN], recomputed, unit="s", sense="max")]


def _turn(client: HeadraceClient, corpora: Iterator[str], layer: int) -> float:
    return read(client, next(corpora), [_hookpoint(layer)])


def _hookpoint(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"
