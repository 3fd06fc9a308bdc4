"""Measures several sides in turns: A B C C B A A B C …, so that other load on the machine falls on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def interleave(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Calls every side once in each round; returns the values of the calls, by side."""
    values: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        # Every other round runs backwards, so that no side always follows the same one.
        order = list(sides.items()) if number % 2 == 0 else list(sides.items())[::-1]
        for name, measure in order:
            values[name].append(measure())
    return values
