"""A queue of chunks between one producing and one consuming thread, bounded in bytes."""

from __future__ import annotations

import threading
import time
from collections import deque

from headrace_client.chunk import ActivationChunk


class ChunkQueue:
    """Holds at most `max_bytes`, or one chunk that is larger. Keeps time of who waited for whom."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._chunks: deque[ActivationChunk] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._finished = False
        self._closed = False
        self.queued_bytes = 0
        self.put_wait_s = 0.0
        self.take_wait_s = 0.0

    def put(self, chunk: ActivationChunk) -> bool:
        """Appends a chunk as soon as there is room; False once closed. Waits as long as the consumer takes its time."""
        with self._changed:
            began = time.monotonic()
            while self._chunks and self.queued_bytes + chunk.size_bytes > self._max_bytes and not self._closed:
                self._changed.wait()  # Ends with take() or close(): the consumer's pace is its own affair.
            self.put_wait_s += time.monotonic() - began
            if self._closed:
                return False
            self._chunks.append(chunk)
            self.queued_bytes += chunk.size_bytes
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """Tells that no chunk will follow."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Tells that no chunk will follow, and why."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Drops what is queued and lets both sides go."""
        with self._changed:
            self._closed = True
            self._chunks.clear()
            self.queued_bytes = 0
            self._changed.notify_all()

    def take(self, wait_s: float) -> ActivationChunk | None:
        """Removes the first chunk; None if none comes within `wait_s` or at the end. Raises what fail() was given."""
        with self._changed:
            if not self._chunks:
                began = time.monotonic()
                self._changed.wait_for(self._has_news, wait_s)
                self.take_wait_s += time.monotonic() - began
            if self._chunks:
                chunk = self._chunks.popleft()
                self.queued_bytes -= chunk.size_bytes
                self._changed.notify_all()
                return chunk
            self._raise_error()
            return None

    def raise_error(self) -> None:
        """Raises what was given to fail()."""
        with self._changed:
            self._raise_error()

    @property
    def ended(self) -> bool:
        """True when every chunk was taken and none will follow."""
        with self._changed:
            return self._finished and not self._chunks

    def _has_news(self) -> bool:
        return bool(self._chunks) or self._finished or self._closed or self._error is not None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
