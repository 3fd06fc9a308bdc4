"""Batches of torch tensors, cut straight from the chunks of a stream into fresh memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from headrace_client.chunk import ActivationChunk
from headrace_client.errors import DataLoss, InvalidArgument, RowsNotContiguous
from headrace_client.stream import ChunkStream
from headrace_client.values import PROVENANCE_COLUMNS, Column, Dtype, Extraction, Progress, StreamHeader, Window

_TAKE_S = 0.2
_PROGRESS_EVERY_S = 0.2
_TORCH_SERIAL_ELEMENTS = 32_768  # torch shares out operations on more (at::internal::GRAIN_SIZE).
_TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.INT32: torch.int32,
    Dtype.FLOAT8_E4M3: torch.float8_e4m3fn,
    Dtype.INT8: torch.int8,
}


class ActivationStream:
    """An iterator of `[batch_size, d]` tensors, or of dicts of them when more than one column is asked for.

    Provenance columns are `[batch_size]` int32. Every tensor is fresh memory that belongs to the caller, who may
    change it in place. Hookpoint columns come in their stored dtype, or converted to `dtype` while copied. Batches do
    not span epochs; the last one of an epoch is shorter, or left out with `drop_last`. `next_row` and `state_dict()`
    count whole batches handed out, so that a checkpoint taken between two steps resumes without gap or duplicate.
    `on_progress` is called in the consumer's thread, at most five times a second, also while it waits. `config` is
    JSON that says what the rows are.
    """

    def __init__(
        self,
        open_at: Callable[[int], ChunkStream],
        *,
        extraction: Extraction,
        columns: tuple[str, ...],
        batch_size: int,
        dtype: torch.dtype | None = None,
        start_row: int = 0,
        epochs: int | None = 1,
        drop_last: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        _check(extraction, columns, batch_size, epochs)
        _silence_read_only_warning()
        self._open_at = open_at
        self._columns = columns
        self._batch_size = batch_size
        self._dtype = dtype
        self._start_row = start_row
        self._epochs = epochs
        self._drop_last = drop_last
        self._on_progress = on_progress
        self._set_id = extraction.set_id
        self._epoch = 0
        self._next_row = start_row
        self._rows_before = 0
        self._bytes_before = 0
        self._stream: ChunkStream | None = None
        self._chunk: ActivationChunk | None = None
        self._offset = 0
        self._batch: dict[str, torch.Tensor] = {}
        self._filled = 0
        self._told_at = 0.0
        self._ended = False
        self._header: StreamHeader | None = None
        self._last_progress: Progress | None = None
        self.config: dict[str, Any] = _config(extraction, columns, batch_size, start_row)

    @property
    def next_row(self) -> int:
        """One past the last row handed out in this epoch."""
        return self._next_row

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch

    @property
    def header(self) -> StreamHeader:
        """The stream's header, with the columns' statistics; waits for it."""
        if self._header is None:
            self._header = self._opened().header
        return self._header

    def state_dict(self) -> dict[str, Any]:
        """Where to resume, as JSON."""
        return {"next_row": self._next_row, "epoch": self._epoch, "set_id": self._set_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the batch after which `state` was taken. InvalidArgument if that was another set."""
        if state["set_id"] != self._set_id:
            raise InvalidArgument(
                f"the state is of set {state['set_id']}, this stream reads {self._set_id}: take the same recipe",
                fields={"set_id": str(state["set_id"])},
            )
        self._reset()
        self._next_row, self._epoch = int(state["next_row"]), int(state["epoch"])
        self._ended = self._epochs is not None and self._epoch >= self._epochs

    def progress(self) -> Progress:
        """How the stream goes, all epochs together; how it went, once closed."""
        if self._stream is None and self._last_progress is not None:
            return self._last_progress
        progress = self._opened().progress()
        self._last_progress = replace(
            progress,
            rows=progress.rows + self._rows_before,
            size_bytes=progress.size_bytes + self._bytes_before,
            epoch=self._epoch,
        )
        return self._last_progress

    def close(self) -> None:
        """Ends the stream; `next()` then stops the iteration."""
        self._reset()
        self._ended = True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        while not self._ended:
            batch = self._fill()
            if batch is not None:
                self._tell()
                return batch if len(self._columns) > 1 else batch[self._columns[0]]
            self._end_epoch()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _opened(self) -> ChunkStream:
        if self._stream is None:
            self._stream = self._open_at(self._next_row)
        return self._stream

    def _fill(self) -> dict[str, torch.Tensor] | None:
        """The next batch; None at the end of the epoch. What it has so far outlives an interrupt."""
        while self._filled < self._batch_size:
            if self._chunk is None and not self._take():
                break
            self._copy()
        if not self._filled or (self._filled < self._batch_size and self._drop_last):
            return None
        filled, self._filled = self._filled, 0
        batch, self._batch = self._batch, {}
        self._next_row += filled
        return batch if filled == self._batch_size else {name: tensor[:filled] for name, tensor in batch.items()}

    def _take(self) -> bool:
        """Takes the next chunk; False at the end."""
        stream = self._opened()
        while True:
            chunk = stream.take(_TAKE_S)
            if chunk is not None:
                break
            if stream.ended:
                return False
            self._tell()
        due = self._next_row + self._filled
        if chunk.first_row != due:
            raise RowsNotContiguous(f"row {chunk.first_row} came where row {due} was due")
        self._chunk, self._offset = chunk, 0
        return True

    def _copy(self) -> None:
        """Moves rows from the chunk to the batch: the one copy on the way."""
        chunk = self._chunk
        assert chunk is not None
        n_rows = min(self._batch_size - self._filled, chunk.n_rows - self._offset)
        by_name = {column.name: at for at, column in enumerate(chunk.columns)}
        for name in self._columns:
            if name not in by_name:
                raise DataLoss(f"the server left out column {name!r}")
            column = chunk.columns[by_name[name]]
            rows = _rows(chunk, by_name[name], self._offset, n_rows)
            part = self._part(column)[self._filled : self._filled + n_rows]
            _copy(part, rows)
            if column.scale_column:
                part.mul_(_scale(chunk, by_name, column, self._offset, n_rows))
        self._filled += n_rows
        self._offset += n_rows
        if self._offset == chunk.n_rows:
            self._chunk = None

    def _part(self, column: Column) -> torch.Tensor:
        if column.name not in self._batch:
            own = torch.float32 if column.scale_column else _TORCH_DTYPES[column.dtype]
            provenance = column.name in PROVENANCE_COLUMNS
            shape = (self._batch_size,) if provenance else (self._batch_size, column.width)
            self._batch[column.name] = torch.empty(shape, dtype=own if provenance else self._dtype or own)
        return self._batch[column.name]

    def _end_epoch(self) -> None:
        if self._next_row == self._start_row and self._epochs != 1:  # More such epochs would spin.
            raise InvalidArgument(
                f"the rows from {self._start_row} on make no batch of {self._batch_size}: take a smaller batch_size",
                fields={"batch_size": str(self._batch_size)},
            )
        self._tell(now=True)
        self._epoch += 1
        self._reset()
        self._next_row = self._start_row
        self._ended = self._epochs is not None and self._epoch >= self._epochs

    def _reset(self) -> None:
        if self._stream is not None:
            progress = self.progress()
            self._rows_before, self._bytes_before = progress.rows, progress.size_bytes
            self._stream.close()
        self._stream = self._chunk = None
        self._batch, self._filled, self._offset = {}, 0, 0

    def _tell(self, *, now: bool = False) -> None:
        if self._on_progress is None:
            return
        at = time.monotonic()
        if now or at - self._told_at >= _PROGRESS_EVERY_S:
            self._told_at = at
            self._on_progress(self.progress())


def _copy(part: torch.Tensor, rows: torch.Tensor) -> None:
    """Copies, converting where dtypes differ, in this thread alone.

    torch would share a larger copy out to its OpenMP threads, which takes forty times longer while the trainer's other
    threads hold the cores; one thread copies faster than any network delivers.
    """
    if part.dtype == rows.dtype:
        np.copyto(part.view(torch.uint8).numpy(), rows.view(torch.uint8).numpy())
        return
    at_once = max(1, _TORCH_SERIAL_ELEMENTS // max(1, rows.numel() // len(rows)))
    for at in range(0, len(rows), at_once):
        part[at : at + at_once].copy_(rows[at : at + at_once])


def _rows(chunk: ActivationChunk, at: int, offset: int, n_rows: int) -> torch.Tensor:
    """A view of some rows of a column in the message: read-only by agreement."""
    column = chunk.columns[at]
    flat = torch.frombuffer(
        chunk.buffers[at],
        dtype=_TORCH_DTYPES[column.dtype],
        count=n_rows * column.width,
        offset=offset * column.row_bytes,
    )
    return flat if column.name in PROVENANCE_COLUMNS else flat.view(n_rows, column.width)


def _scale(
    chunk: ActivationChunk, by_name: Mapping[str, int], column: Column, offset: int, n_rows: int
) -> torch.Tensor:
    if column.scale_column not in by_name:
        raise InvalidArgument(
            f"values of {column.name} need their scale: ask for column {column.scale_column!r} too",
            fields={"columns": column.scale_column},
        )
    return _rows(chunk, by_name[column.scale_column], offset, n_rows)


def _check(extraction: Extraction, columns: tuple[str, ...], batch_size: int, epochs: int | None) -> None:
    if batch_size < 1:
        raise InvalidArgument(f"batch_size is at least 1, not {batch_size}", fields={"batch_size": str(batch_size)})
    if not columns or len(set(columns)) != len(columns):
        raise InvalidArgument("columns names at least one column, each once", fields={"columns": ", ".join(columns)})
    if epochs is not None and epochs < 1:
        raise InvalidArgument(f"epochs is at least 1, or None for ever, not {epochs}", fields={"epochs": str(epochs)})
    if epochs != 1 and isinstance(extraction.retention, Window):
        raise InvalidArgument(
            "a WINDOW extraction can be read once: take epochs=1, or retain the rows", fields={"epochs": str(epochs)}
        )


def _config(extraction: Extraction, columns: tuple[str, ...], batch_size: int, start_row: int) -> dict[str, Any]:
    return {
        "source": "headrace",
        "extraction_id": extraction.id,
        "set_id": extraction.set_id,
        "model_id": extraction.model_id,
        "corpus_id": extraction.corpus_id,
        "columns": list(columns),
        "recipe": {
            name: str(value) if isinstance(value, str) else value for name, value in asdict(extraction.recipe).items()
        },
        "batch_size": batch_size,
        "start_row": start_row,
    }


@cache
def _silence_read_only_warning() -> None:
    """Lets torch warn, once and unheard, that it can't make read-only tensors: ours are only copied from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
