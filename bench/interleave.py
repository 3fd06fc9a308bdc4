"""Measures several sides in turns: A B C C B A A B C …, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def interleave(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Calls every side once in each of `rounds` turns; returns what the calls returned, by side."""
    values: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        # Every other turn runs backwards: nobody always follows the same neighbour.
        order = list(sides.items()) if number % 2 == 0 else list(sides.items())[::-1]
        for name, measure in order:
            values[name].append(measure())
    return values
