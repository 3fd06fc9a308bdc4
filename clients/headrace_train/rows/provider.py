"""Mixed batches without end, in fresh tensors, as SAELens takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Self

import torch

from headrace_client.errors import InvalidArgument
from headrace_train.rows.blocks import RowBlock, RowFilter, norms

_MOST_BUFFER_BYTES = 1 << 30
_FIRST_SHARE = 4  # Training starts with a quarter of the buffer filled: a slow extraction would take long for all.


class MixingProvider:
    """An endless iterator of raw `[batch_size, d]` float32 tensors on `device`, each fresh memory.

    One buffer holds rows. A batch is taken from slots drawn at random; the next rows of the stream then fill these
    slots. The order of rows depends on the stream and the seed alone. `blocks` must never end (a stream of endless
    epochs); `n_rows` is the number of rows in one epoch. `wait_s` adds up the seconds spent waiting for the stream.
    """

    def __init__(
        self,
        blocks: Iterator[RowBlock],
        row_filter: RowFilter,
        *,
        n_rows: int,
        batch_size: int,
        buffer_rows: int,
        seed: int,
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wait_s = 0.0
        self._blocks = blocks
        self._filter = row_filter
        self._n_rows = n_rows
        self._batch_size = batch_size
        self._capacity = max(batch_size, min(buffer_rows, n_rows))
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self._clock = clock
        self._buffer = torch.empty(0)
        self._filled = 0
        self._vacant = torch.empty(0, dtype=torch.long)
        self._rest = torch.empty(0, 0)

    def warm(self) -> torch.Tensor:
        """Fills the first part of the buffer and calibrates the filter; returns a view of these rows, not yet mixed."""
        self._rest = first = self._next_kept()
        capacity = min(self._capacity, max(self._batch_size, _MOST_BUFFER_BYTES // (first.shape[1] * 4)))
        self._buffer = torch.empty((capacity, first.shape[1]), device=self._device)
        self._grow(max(self._batch_size, capacity // _FIRST_SHARE))
        self._filter.calibrate(self._buffer[: self._filled])
        if (limit := self._filter.norm_limit) is not None:
            # The rows so far were taken before the limit was known.
            self._rest = self._rest[norms(self._rest) <= limit]
            good = norms(self._buffer[: self._filled]) <= limit
            n_good = int(good.sum())
            self._buffer[:n_good] = self._buffer[: self._filled][good]
            self._filled = n_good
            self._grow(max(0, self._batch_size - n_good))
        return self._buffer[: self._filled]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        if not self._filled:
            self.warm()
        # The slots of the last batch are filled only now: no rows are awaited for a batch that is never asked for.
        at = 0
        while at < len(self._vacant):
            rows = self._take(len(self._vacant) - at)
            self._buffer[self._vacant[at : at + len(rows)]] = rows
            at += len(rows)
        self._vacant = self._vacant[:0]
        self._grow(self._batch_size)
        slots = torch.randperm(self._filled, generator=self._generator)[: self._batch_size]
        self._vacant = slots.to(self._device)
        return self._buffer[self._vacant]

    def _grow(self, n_rows: int) -> None:
        """Adds up to `n_rows` rows while there is room."""
        end = min(self._filled + n_rows, len(self._buffer))
        while self._filled < end:
            rows = self._take(end - self._filled)
            self._buffer[self._filled : self._filled + len(rows)] = rows
            self._filled += len(rows)

    def _take(self, most: int) -> torch.Tensor:
        """Returns the next rows, at least one and at most `most`, on the device."""
        if not len(self._rest):
            self._rest = self._next_kept()
        rows, self._rest = self._rest[:most], self._rest[most:]
        return rows.to(self._device)

    def _next_kept(self) -> torch.Tensor:
        """Returns the kept rows of the next block that has any. Raises InvalidArgument if an epoch has none."""
        n_dropped = 0
        while True:
            start = self._clock()
            block = next(self._blocks)
            self.wait_s += self._clock() - start
            rows = self._filter.kept(block)
            if len(rows):
                return rows
            n_dropped += len(block)
            if n_dropped > self._n_rows:
                raise InvalidArgument(
                    f"none of {self._n_rows} rows is fit for training: all are first positions or outliers",
                    remedy="take --no-drop-bos, or --max-norm-multiple 0",
                )
