"""A queue of chunks between one producing and one consuming thread, bounded in bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from headrace_client.reading.chunk import ActivationChunk

_PAUSE_S = 2.0  # A server's ping waits no longer than this for its answer.


class ChunkQueue:
    """Holds at most `max_bytes`, or one chunk that is larger. Measures for how long each side waited for the other.

    The consumer of a fast stream waits for every chunk anew, so waking it must be cheap: a SimpleQueue does it in C.
    The producer waits only when the queue is full. Either side writes only its own counter; no chunk is empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._chunks: SimpleQueue[ActivationChunk | None] = SimpleQueue()  # None wakes the consumer for other news.
        self._room = threading.Condition()
        self._producer_waits = False
        self._put_bytes = 0
        self._taken_bytes = 0
        self._error: Exception | None = None
        self._finished = False
        self._closed = False
        self.put_wait_s = 0.0
        self.take_wait_s = 0.0

    @property
    def queued_bytes(self) -> int:
        """Bytes of the chunks that wait for the consumer."""
        return 0 if self._closed else self._put_bytes - self._taken_bytes

    @property
    def ended(self) -> bool:
        """True when every chunk was taken and none will follow."""
        return self._finished and self._drained

    def put(self, chunk: ActivationChunk, while_full: Callable[[], None]) -> bool:
        """Appends a chunk as soon as there is room; False once closed.

        Waits for as long as the queue is full, and calls `while_full` every few seconds meanwhile.
        """
        if not self._has_room(chunk):
            began = time.monotonic()
            while True:
                with self._room:
                    self._producer_waits = True  # Before looking again: from now on, taking a chunk will notify.
                    has_room = self._room.wait_for(lambda: self._has_room(chunk), _PAUSE_S)
                    self._producer_waits = False
                if has_room:
                    break
                while_full()
            self.put_wait_s += time.monotonic() - began
        if self._closed:
            return False
        self._put_bytes += chunk.size_bytes
        self._chunks.put(chunk)
        return True

    def finish(self) -> None:
        """Tells the consumer that no chunk will follow."""
        self._finished = True
        self._chunks.put(None)

    def fail(self, error: Exception) -> None:
        """Tells the consumer that no chunk will follow, and why."""
        self._error = error
        self._chunks.put(None)

    def close(self) -> None:
        """Drops the queued chunks and ends the waits of both sides."""
        self._closed = True
        with suppress(Empty):
            while True:
                self._chunks.get_nowait()
        self._chunks.put(None)
        with self._room:
            self._room.notify_all()

    def take(self, wait_s: float) -> ActivationChunk | None:
        """Removes the first chunk; None if none comes within `wait_s`, or at the end. Raises the error of `fail`."""
        chunk = None
        try:
            chunk = self._chunks.get_nowait()
        except Empty:
            if not (self._finished or self._closed or self._error is not None):
                began = time.monotonic()
                try:
                    with suppress(Empty):
                        chunk = self._chunks.get(timeout=wait_s)
                finally:
                    self.take_wait_s += time.monotonic() - began
        if chunk is None:
            if self._drained:
                self.raise_error()
            return None
        self._taken_bytes += chunk.size_bytes
        if self._producer_waits:
            with self._room:
                self._room.notify_all()
        return chunk

    def raise_error(self) -> None:
        """Raises the error given to `fail`, if there is one."""
        if self._error is not None:
            raise self._error

    @property
    def _drained(self) -> bool:
        return self._put_bytes == self._taken_bytes

    def _has_room(self, chunk: ActivationChunk) -> bool:
        queued_bytes = self._put_bytes - self._taken_bytes
        return self._closed or not queued_bytes or queued_bytes + chunk.size_bytes <= self._max_bytes
