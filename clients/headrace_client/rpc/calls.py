"""Calls that another thread may cancel: those of one piece of work, of which one is under way at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar

from headrace_client.errors import Cancelled


class Calls:
    """The calls of one piece of work. Once cancelled, it ends every further call as it begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel_current: Callable[[], object] = lambda: None
        self._cancelled = False

    def begin(self, cancel: Callable[[], object]) -> None:
        """Notes the call under way by the function that cancels it. Raises Cancelled if the work is cancelled."""
        with self._lock:
            self._cancel_current = cancel
            cancelled = self._cancelled
        if cancelled:
            cancel()
            # Not the status of the call: a watch would take that for a lost connection, and connect again.
            raise Cancelled("the caller was cancelled")

    def cancel(self) -> None:
        """Cancels the call under way and all further ones. From any thread."""
        with self._lock:
            self._cancelled = True
            cancel = self._cancel_current
        cancel()


# Set where work runs in a thread for a coroutine, which may be cancelled before the thread is done.
CALLS: ContextVar[Calls | None] = ContextVar("headrace_calls", default=None)
