"""Measures several sides in turns: A B C A B C …, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls every side once without counting it, then `rounds` times in turns; returns what each call returned."""
    for measure in sides.values():
        measure()
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        # Every other round runs backwards: nobody always follows the same neighbour.
        order = list(sides.items()) if number % 2 == 0 else list(reversed(sides.items()))
        for name, measure in order:
            values[name].append(measure())
    return values
