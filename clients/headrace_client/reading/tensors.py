"""Batches of torch tensors, cut straight from the chunks of a stream into fresh memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch

from headrace_client.errors import InvalidArgument, RowsNotContiguous
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.reading.mixing import Mixer
from headrace_client.reading.source import StreamRequest
from headrace_client.reading.stream import ChunkStream
from headrace_client.reading.tables import Table, silence_read_only_warning, view
from headrace_client.values import Progress, ReadOrder, StreamHeader, Window

_TAKE_S = 0.2  # `on_progress` is called between takes.
_PROGRESS_EVERY_S = 0.2
_ALL = 1 << 62  # More rows than any batch has.


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How rows become batches: see ActivationStream."""

    columns: tuple[str, ...]
    batch_size: int = 4096
    dtype: torch.dtype | None = None
    epochs: int | None = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise _invalid("batch_size", self.batch_size, "is at least 1")
        if not self.columns or len(set(self.columns)) != len(self.columns):
            raise _invalid("columns", ", ".join(self.columns), "names at least one column, each once")
        if self.epochs is not None and self.epochs < 1:
            raise _invalid("epochs", self.epochs, "is at least 1, or None for ever")


class ActivationStream:
    """An iterator of `[batch_size, d]` tensors, or of dicts of them when more than one column is asked for.

    Provenance columns are `[batch_size]` int32. Every tensor belongs to the caller and may be changed in place. It is
    fresh memory unless `StreamTuning.copy` is false: then batches that lie in one chunk, as they are stored, are views
    of it; in a mapped file, writing to a page copies the page first. Hookpoint columns come in their stored dtype, or
    converted to `dtype` while copied. Batches do not span epochs; the last batch of an epoch is shorter, or left out
    with `drop_last`. `next_row` and `state_dict()` count whole batches handed out: a checkpoint resumes without gap or
    duplicate, also if it was taken while a batch was awaited, after an error, or after `close`.

    `Reading.mix_blocks` mixes all columns alike, and two windows are in memory. With `Reading.norm_limit`, shards may
    come to different numbers of batches. `on_progress` is called in the consumer's thread, at most five times a second,
    also while it waits. `config` is JSON that identifies the rows: set, model, corpus, recipe, columns, order.
    """

    def __init__(
        self,
        open_stream: Callable[[StreamRequest], ChunkStream],
        request: StreamRequest,
        options: BatchOptions,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        extraction, reading = request.extraction, request.reading
        if options.epochs != 1 and isinstance(extraction.retention, Window):
            raise InvalidArgument(
                "a WINDOW extraction can be read once: take epochs=1, or retain the rows",
                fields={"epochs": str(options.epochs)},
            )
        if reading.mix_blocks and isinstance(extraction.retention, Window):
            raise InvalidArgument(
                "mixing reads far ahead of what it hands out, and a WINDOW extraction lets go of what was read: no "
                "state could be resumed from; take mix_blocks=0, or retain the rows",
                fields={"mix_blocks": str(reading.mix_blocks)},
            )
        silence_read_only_warning()
        self._open_stream = open_stream
        self._request = request
        self._options = options
        self._on_progress = on_progress
        self._identity = {"set_id": extraction.set_id, **reading.identity}
        if reading.order is ReadOrder.SHUFFLED:
            self._identity["max_rows"] = extraction.max_rows  # The number of blocks that are permuted follows from it.
        self._epoch = 0
        self._next_row = request.start_row
        self._next_offset = 0
        self._rows_before = self._bytes_before = 0
        self._wait_before_s = self._step_s = 0.0
        self._n_dropped = 0
        self._stream: ChunkStream | None = None
        self._chunk: ActivationChunk | None = None
        self._offset = 0
        self._place = request.start_row
        self._batch: Table | None = None
        self._limits: dict[str, float] | None = None
        self._mixer: Mixer | None = None
        self._handed_out_at: float | None = None
        self._told_at = 0.0
        self._ended = False
        self._header: StreamHeader | None = None
        self._last_progress: Progress | None = None
        self.config: dict[str, Any] = _config(request, options)

    @property
    def next_row(self) -> int:
        """Where to resume in this epoch's order: behind the last row handed out, or at the window being mixed."""
        return self._next_row

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch

    @property
    def n_dropped(self) -> int:
        """Rows left out for their norm, before the last batch handed out."""
        return self._n_dropped

    @property
    def header(self) -> StreamHeader:
        """The stream's header, with the columns' statistics; waits for it."""
        if self._header is None:
            self._header = self._opened().header
        return self._header

    def state_dict(self) -> dict[str, Any]:
        """Where to resume, as JSON."""
        return {
            **self._identity,
            "epoch": self._epoch,
            "next_row": self._next_row,
            "offset": self._next_offset,
            "n_dropped": self._n_dropped,
            "norm_limits": self._limits,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the batch after which `state` was taken. InvalidArgument if it is of another set or order."""
        for name, ours in self._identity.items():
            theirs = state.get(name, ours)  # Older versions left some names out.
            if theirs != ours:
                raise InvalidArgument(
                    f"the state is of {name} {theirs}, this stream reads {ours}: take the same recipe, rows and order",
                    fields={name: str(theirs)},
                )
        self._seek(int(state["epoch"]), int(state["next_row"]), int(state.get("offset", 0)))
        self._n_dropped = int(state.get("n_dropped", 0))
        self._limits = state.get("norm_limits") or None

    def skip_batches(self, n_batches: int) -> None:
        """Goes on as if so many batches had been handed out; waits for the stream's header with several epochs.

        Needs whole batches (`drop_last`) and no norm limit: then the place follows from the number.
        """
        options, reading, start_row = self._options, self._request.reading, self._request.start_row
        if reading.norm_limit is not None or not options.drop_last:
            raise _invalid("n_batches", n_batches, "can be skipped only with drop_last, and without a norm limit")
        epoch = 0
        if options.epochs != 1:
            end_row = self.header.end_row
            if not end_row:
                raise _invalid("n_batches", n_batches, "can be skipped over epochs once the extraction is done")
            epoch, n_batches = divmod(n_batches, max(1, (end_row - start_row) // options.batch_size))
        place, offset = start_row + n_batches * options.batch_size, 0
        if reading.mix_blocks:
            window_rows = reading.mix_blocks * reading.rows_in_block
            window_start = max(start_row, place // window_rows * window_rows)
            place, offset = window_start, place - window_start
        self._seek(epoch, place, offset)

    def progress(self) -> Progress:
        """Rows and waits so far, over all epochs; the last ones, once closed."""
        if self._stream is None and self._last_progress is not None:
            return self._last_progress
        progress = self._opened().progress()
        self._last_progress = replace(
            progress,
            rows=progress.rows + self._rows_before,
            size_bytes=progress.size_bytes + self._bytes_before,
            epoch=self._epoch,
            wait_s=progress.wait_s + self._wait_before_s,
            step_s=self._step_s,
            n_dropped=self._n_dropped,
        )
        return self._last_progress

    def close(self) -> None:
        """Ends the stream; `next()` then stops the iteration."""
        self._reset()
        self._ended = True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._handed_out_at is not None:
            self._step_s += time.monotonic() - self._handed_out_at
            self._handed_out_at = None
        if not self._ended:
            self._tell()  # Not with a batch in hand: an error of `on_progress` must not cost the caller any rows.
        while not self._ended:
            batch = self._next_batch()
            if batch is not None:
                self._handed_out_at = time.monotonic()
                columns = self._options.columns
                return {name: batch[name] for name in columns} if len(columns) > 1 else batch[columns[0]]
            self._end_epoch()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _opened(self) -> ChunkStream:
        if self._stream is None:
            reading = self._request.reading
            in_epoch = reading.in_epoch(reading.epoch + self._epoch)
            self._stream = self._open_stream(replace(self._request, start_row=self._place, reading=in_epoch))
        return self._stream

    def _next_batch(self) -> dict[str, torch.Tensor] | None:
        """The next batch; None at the end of the epoch. Rows already in it outlive an interrupt."""
        if self._batch is None:
            if not self._request.tuning.copy and (viewed := self._viewed()) is not None:
                return viewed
            self._batch = self._table(self._options.batch_size)
        batch, reading = self._batch, self._request.reading
        if reading.mix_blocks:
            if self._mixer is None:
                self._mixer = Mixer(reading.mix_blocks * reading.rows_in_block, reading.seed, self._table)
                self._mixer.begin(reading.epoch + self._epoch, self._next_row, self._next_offset, self._n_dropped)
            self._mixer.fill(batch, self._pull)
        else:
            while not batch.full and self._pull(batch, _ALL, wait=True):
                pass
        if not batch.n_rows or (not batch.full and self._options.drop_last):
            return None
        self._batch = None
        # From here on a state is behind this batch.
        if self._mixer is None:
            self._next_row = self._place
            self._n_dropped += batch.n_dropped
        else:
            self._next_row, self._next_offset = self._mixer.place, self._mixer.offset
            self._n_dropped = self._mixer.n_dropped
        return batch.cut()

    def _viewed(self) -> dict[str, torch.Tensor] | None:
        """The next batch without a copy, if it lies in one chunk as it is stored."""
        options, reading = self._options, self._request.reading
        if reading.mix_blocks or reading.norm_limit is not None:
            return None
        if self._chunk is None and not self._take(wait=True):
            return None
        chunk, n_rows = self._chunk, options.batch_size
        if chunk is None or chunk.n_rows - self._offset < n_rows:
            return None
        rows = view(options.columns, chunk, self._offset, n_rows, options.dtype)
        if rows is not None:
            self._pass(chunk, n_rows)
            self._next_row = self._place
        return rows

    def _table(self, capacity: int) -> Table:
        norm_limit, columns = self._request.reading.norm_limit, self._options.columns
        if norm_limit is not None and self._limits is None:
            self._limits = norm_limit.of(self.header, columns)
        return Table(columns, capacity, self._options.dtype, self._limits)

    def _pull(self, table: Table, most: int, *, wait: bool) -> int:
        if self._chunk is None and not self._take(wait=wait):
            return 0
        chunk = self._chunk
        assert chunk is not None
        n_rows = table.take(chunk, self._offset, most)
        self._pass(chunk, n_rows)
        return n_rows

    def _pass(self, chunk: ActivationChunk, n_rows: int) -> None:
        self._place += n_rows
        self._offset += n_rows
        if self._offset == chunk.n_rows:
            self._chunk = None

    def _take(self, *, wait: bool) -> bool:
        """Takes the next chunk; False at the end, and without `wait` if none is queued."""
        stream = self._opened()
        while True:
            try:
                # Rows of an unfinished batch are kept, to resume before it. If the batch is larger than the window,
                # they can't be: the forward pass would wait for their release for good.
                keep_from = None if stream.held_up else self._next_row
                chunk = stream.take(_TAKE_S if wait else 0.0, keep_from=keep_from)
            except Exception:
                if wait:
                    raise
                return False  # The error comes again when rows are needed; the batch at hand is whole.
            if chunk is not None:
                break
            if stream.ended or not wait:
                return False
            self._tell()
        if chunk.place != self._place:
            raise RowsNotContiguous(f"row {chunk.place} came where row {self._place} was due")
        self._chunk, self._offset = chunk, 0
        return True

    def _end_epoch(self) -> None:
        options, start_row = self._options, self._request.start_row
        if (self._next_row, self._next_offset) == (start_row, 0) and options.epochs != 1:
            # The epoch had no batch, and more such epochs would spin.
            raise _invalid("batch_size", options.batch_size, f"is more than the rows from {start_row} on")
        if self._mixer is not None:
            self._n_dropped = self._mixer.n_dropped_in_all
        elif self._batch is not None:
            self._n_dropped += self._batch.n_dropped
        self._seek(self._epoch + 1, start_row, 0)
        self._tell(self._last_progress)

    def _seek(self, epoch: int, place: int, offset: int) -> None:
        self._reset()
        self._epoch, self._next_row, self._next_offset, self._place = epoch, place, offset, place
        self._ended = self._options.epochs is not None and epoch >= self._options.epochs

    def _reset(self) -> None:
        if self._stream is not None:
            progress = self.progress()  # Totals go on over the streams of all epochs.
            self._rows_before, self._bytes_before = progress.rows, progress.size_bytes
            self._wait_before_s = progress.wait_s
            self._stream.close()
        self._stream = self._chunk = self._batch = self._mixer = None
        self._offset = 0

    def _tell(self, last: Progress | None = None) -> None:
        """Calls `on_progress` if it is time to; with `last`, the progress of an ended epoch, in any case."""
        if self._on_progress is None:
            return
        at = time.monotonic()
        if last is not None or at - self._told_at >= _PROGRESS_EVERY_S:
            self._told_at = at
            self._on_progress(last or self.progress())


def _invalid(name: str, value: object, rule: str) -> InvalidArgument:
    return InvalidArgument(f"{name} {rule}, not {value}", fields={name: str(value)})


def _config(request: StreamRequest, options: BatchOptions) -> dict[str, Any]:
    extraction = request.extraction
    return {
        "source": "headrace",
        "extraction_id": extraction.id,
        "set_id": extraction.set_id,
        "model_id": extraction.model_id,
        "corpus_id": extraction.corpus_id,
        "columns": list(options.columns),
        "recipe": {
            name: str(value) if isinstance(value, str) else value for name, value in asdict(extraction.recipe).items()
        },
        "batch_size": options.batch_size,
        "start_row": request.start_row,
        **request.reading.identity,
    }
