"""Rows of an activation set as numpy views, chunk by chunk, over as many connections as it takes."""

from __future__ import annotations

import time
import weakref
from collections import deque
from types import TracebackType
from typing import Self

from headrace_client.errors import Cancelled
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.reading.prefetch import Prefetcher, Source
from headrace_client.reading.releaser import Releaser
from headrace_client.reading.source import StreamRequest
from headrace_client.reading.waits import shared_out
from headrace_client.values import Progress, StreamHeader, StreamState

_RATE_WINDOW_S = 5.0
_TAKE_S = 0.5  # Between looks for `close` by another thread.


class ChunkStream:
    """An iterator of chunks, in reading order, without gap or duplicate.

    A thread reads ahead into a queue bounded in bytes. Lost connections and silent servers are replaced, going on at
    the next row, until no row came for `reconnect_deadline_s`: then StreamLost. Errors are raised in the consumer.
    Iteration may stop and go on at any time; `close()`, the `with` block or garbage collection ends it. For one
    consuming thread; not to be carried over a fork.
    """

    def __init__(self, source: Source, request: StreamRequest) -> None:
        self._request = request
        self._prefetcher = Prefetcher(source, request)
        self._releaser = Releaser(source) if request.explicit_release else None
        self._next_row = request.start_row
        self._released = 0  # Not `start_row`: an earlier connection of this reader may have left rows unreleased.
        self._size_bytes = 0
        self._unreleased_bytes = 0
        self._rates = _RateMeter()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop, self._prefetcher, self._releaser)
        self._prefetcher.start()

    @property
    def header(self) -> StreamHeader:
        """The stream's header; waits for it."""
        while not self._prefetcher.header_ready.wait(_TAKE_S):
            self._check_open()
            self._prefetcher.queue.raise_error()
        header = self._prefetcher.header
        assert header is not None
        return header

    @property
    def next_row(self) -> int:
        """Where to resume: one past the last row handed out, as a place in the reading order if there is one."""
        return self._next_row

    @property
    def ended(self) -> bool:
        """True when every row was handed out."""
        return self._prefetcher.queue.ended

    @property
    def held_up(self) -> bool:
        """True if the forward pass waited for readers when the server last spoke, and no row is queued."""
        return not self._prefetcher.queue.queued_bytes and self._prefetcher.held_up

    def take(self, wait_s: float, keep_from: int | None = None) -> ActivationChunk | None:
        """Returns the next chunk; None if none came within `wait_s`, or at the end (then `ended` is True).

        Taking a chunk releases the chunks before it: the server may drop their rows of a WINDOW set. With `keep_from`,
        only rows before that place are released; if the window is smaller than the rows kept, the stream stays
        `held_up`.
        """
        self._check_open()
        prefetcher, quarter = self._prefetcher, self._request.tuning.queue_bytes // 4
        place = self._next_row if keep_from is None else keep_from
        # In quarters of the queue, to save calls; sooner when the queue runs low, since the server may wait for it.
        is_due = self._unreleased_bytes >= quarter or prefetcher.queue.queued_bytes < quarter
        # Before the header came, the server does not know this reader.
        if self._releaser is not None and prefetcher.header is not None and place > self._released and is_due:
            self._releaser.offer(self._request.reading.first_row_needed(place))
            self._released, self._unreleased_bytes = place, 0
        chunk = prefetcher.queue.take(wait_s)
        self._check_open()
        if chunk is not None:
            self._next_row = chunk.end_place
            self._size_bytes += chunk.size_bytes
            self._unreleased_bytes += chunk.size_bytes
        return chunk

    def progress(self) -> Progress:
        """Rows so far, and how the stream went over the last seconds."""
        queue, prefetcher = self._prefetcher.queue, self._prefetcher
        rows = self._next_row - self._request.start_row
        now = time.monotonic()
        rates = self._rates.rates(now, rows, queue.take_wait_s, queue.put_wait_s, *prefetcher.waited.by(now))
        extractor_wait, network_wait = shared_out(min(1.0, rates[1]), rates[3], rates[4])
        end_row = self._request.end_row or (prefetcher.header.end_row if prefetcher.header else 0)
        return Progress(
            state=StreamState.ENDED if self.ended else prefetcher.state,
            extraction_state=prefetcher.extraction_state,
            rows=rows,
            next_row=self._next_row,
            end_row=end_row or None,
            n_rows_committed=prefetcher.n_rows_committed,
            rows_per_s=rates[0],
            size_bytes=self._size_bytes,
            queued_bytes=queue.queued_bytes,
            stream_wait=min(1.0, rates[1]),
            consumer_wait=min(1.0, rates[2]),
            n_reconnects=prefetcher.n_reconnects,
            extractor_wait=extractor_wait,
            network_wait=network_wait,
            wait_s=queue.take_wait_s,
            mapped=prefetcher.mapped,
        )

    def close(self, *, for_good: bool = True) -> None:
        """Cancels the stream and waits for its threads, up to a deadline. Any number of times.

        Unless `for_good`, a WINDOW set keeps unreleased rows for a reader of the same name, as after a cut.
        """
        self._closed = True
        if self._releaser is not None and not for_good:
            self._releaser.comes_back = True
        self._finalizer()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ActivationChunk:
        while True:
            chunk = self.take(_TAKE_S)
            if chunk is not None:
                return chunk
            if self.ended:
                raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled(
                "the stream is closed", reason="STREAM_CLOSED", remedy="open a new one at start_row = next_row"
            )


def _stop(prefetcher: Prefetcher, releaser: Releaser | None) -> None:
    # No method: a finalizer that refers to the stream would keep it alive.
    if releaser is not None:
        releaser.stop()
    prefetcher.stop()
    if releaser is not None:
        releaser.join()


class _RateMeter:
    """Rates of growing totals over the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, ...]] = deque()

    def rates(self, now: float, *totals: float) -> tuple[float, ...]:
        """Growth per second of each total."""
        # Fifty samples a window keep the memory bounded, however often `progress` is called.
        if not self._samples or now - self._samples[-1][0] > _RATE_WINDOW_S / 50:
            self._samples.append((now, *totals))
        while len(self._samples) > 1 and now - self._samples[0][0] > _RATE_WINDOW_S:
            self._samples.popleft()
        first = self._samples[0]
        span_s = max(now - first[0], 1e-9)
        return tuple(
            (total - before) / span_s if now > first[0] else 0.0
            for total, before in zip(totals, first[1:], strict=True)
        )
