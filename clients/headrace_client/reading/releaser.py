"""The thread that tells the server which rows of a WINDOW set are no longer needed."""

from __future__ import annotations

import contextlib
import logging
import threading

from headrace_client.errors import HeadraceError
from headrace_client.reading.prefetch import Source

_FOR_GOOD = (1 << 63) - 1  # Releasing this row says that the reader comes no more.
_RELEASE_PAUSE_S = 0.05  # Between ReleaseRows calls: one call covers all rows taken in between.
_RETRY_PAUSE_S = 0.5
_FAREWELL_S = 2.0  # A server that is there takes the last release at once.
_LOG = logging.getLogger("headrace_client")


class Releaser:
    """Sends ReleaseRows for a WINDOW set from a thread of its own.

    Not from the prefetching thread: with a full window, that thread waits for rows which come only after a release.
    """

    def __init__(self, source: Source) -> None:
        self.comes_back = False
        self._source = source
        self._changed = threading.Condition()
        self._row = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="headrace-release", daemon=True)
        self._thread.start()

    def offer(self, row: int) -> None:
        """Has rows before `row` released; returns at once."""
        with self._changed:
            self._row = max(self._row, row)
            self._changed.notify_all()

    def stop(self) -> None:
        """Has the thread send a last release and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Waits until the last release was sent, up to a deadline: after that a client closes its connections."""
        if threading.current_thread() is not self._thread:
            self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        sent = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._row > sent)  # noqa: B023 - called before `sent` changes.
                if self._stopping:
                    break
                row = self._row
            try:
                self._source.release(row)
                sent, pause_s = row, _RELEASE_PAUSE_S
            except HeadraceError as exc:
                # While the stream reconnects there is no reader to release for; the next call covers these rows too.
                _LOG.debug("release of rows before %d: %s", row, exc)
                pause_s = _RETRY_PAUSE_S
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, pause_s)
        if self.comes_back:
            return
        # Other readers of the window need not wait for this one.
        with contextlib.suppress(HeadraceError):
            self._source.release(_FOR_GOOD)
