"""Mixes rows within windows of the reading order: one permutation for all columns, the same on every run.

Window w holds the places [w * window_rows, (w + 1) * window_rows), short of rows left out as outliers. At any time:

    [start of the current window, its end)       gathered into batches, by its permutation
    [its end, place of the following window)     copied there, a batch's worth for each batch handed out
    [that place, ...)                            in the stream
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace_client.reading.tables import Table
from headrace_log.order import mixed_rows


class Pull(Protocol):
    """Copies rows of the stream to a table."""

    def __call__(self, table: Table, most: int, *, wait: bool) -> int:
        """Returns by how many places the stream went on: 0 at its end, and without `wait` if no row is queued."""


@dataclass
class _MixingWindow:
    """Rows of the places `start` to `end`, filled up to `place`; `order` is known once the window is full."""

    number: int
    start: int
    end: int
    table: Table
    place: int
    taken: int = 0
    order: NDArray[np.int64] | None = None

    @property
    def exhausted(self) -> bool:
        return self.order is not None and self.taken >= len(self.order)

    def fill(self, most: int, pull: Pull, *, wait: bool) -> None:
        """Copies up to `most` rows, until the stream brings none or the window is full."""
        while most > 0 and self.place < self.end:
            n_rows = pull(self.table, min(most, self.end - self.place), wait=wait)
            if not n_rows:
                return
            self.place += n_rows
            most -= n_rows


class Mixer:
    """Hands out rows window by window; while one is handed out, the following one is filled with rows that came.

    Two windows are in memory. The table of a window that was handed out serves the window after the next.
    """

    def __init__(self, window_rows: int, seed: int, make_table: Callable[[int], Table]) -> None:
        self._n_dropped = 0  # In the windows before the current one.
        self._window_rows = window_rows
        self._seed = seed
        self._make_table = make_table
        self._spare: Table | None = None
        self.begin(0, 0, 0)

    def begin(self, epoch: int, place: int, offset: int, n_dropped: int = 0) -> None:
        """Goes on in the window at `place`, behind its first `offset` rows; `n_dropped` were left out before it."""
        self._n_dropped = n_dropped
        self._epoch = epoch
        self._current: _MixingWindow | None = None
        self._following: _MixingWindow | None = self._window(place)
        self._offset = offset

    @property
    def place(self) -> int:
        """Start of the current window; its end once all of its rows were handed out."""
        window = self._current or self._following
        assert window is not None, "there is always one of them"
        return window.place if window.exhausted else window.start

    @property
    def offset(self) -> int:
        """Rows of the window at `place` that were handed out."""
        if self._current is None:
            return self._offset
        return 0 if self._current.exhausted else self._current.taken

    @property
    def n_dropped(self) -> int:
        """Rows left out before `place`."""
        window = self._current
        return self._n_dropped + (window.table.n_dropped if window is not None and window.exhausted else 0)

    @property
    def n_dropped_in_all(self) -> int:
        """Rows left out in the windows filled so far."""
        windows = (self._current, self._following)
        return self._n_dropped + sum(window.table.n_dropped for window in windows if window is not None)

    def fill(self, batch: Table, pull: Pull) -> None:
        """Fills a batch, or a part of it at the end of the stream."""
        while not batch.full:
            if self._current is None or self._current.exhausted:
                if not self._turn(pull):
                    return
                continue
            window, order = self._current, self._current.order
            assert order is not None, "a window is handed out once it is filled"
            rows = order[window.taken : window.taken + batch.capacity - batch.n_rows]
            window.table.gather(rows, batch)
            window.taken += len(rows)
        self._following_window().fill(batch.capacity, pull, wait=False)

    def _turn(self, pull: Pull) -> bool:
        """Goes on to the following window; False if the stream has no row for it."""
        window = self._following_window()
        window.fill(self._window_rows, pull, wait=True)
        if window.place == window.start:
            return False
        window.order = mixed_rows(window.table.n_rows, self._seed, self._epoch, window.number)
        window.taken, self._offset = self._offset, 0
        if self._current is not None:
            self._n_dropped += self._current.table.n_dropped
            self._spare = self._current.table
        self._current, self._following = window, None
        return True

    def _following_window(self) -> _MixingWindow:
        if self._following is None:
            assert self._current is not None, "there is always one of them"
            self._following = self._window(self._current.place)
        return self._following

    def _window(self, place: int) -> _MixingWindow:
        number = place // self._window_rows
        table, self._spare = self._spare or self._make_table(self._window_rows), None
        table.n_rows = table.n_dropped = 0
        return _MixingWindow(number=number, start=place, end=(number + 1) * self._window_rows, table=table, place=place)
