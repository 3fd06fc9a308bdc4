"""How far an extraction may write: moved by the command reader, waited for by the extraction."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class Gate:
    """Rows before `grant_row` may be written; None means all."""

    def __init__(self, grant_row: int | None) -> None:
        self._changed = threading.Condition()
        self._end_row = sys.maxsize if grant_row is None else grant_row
        self._stopped = False

    def grant(self, row: int) -> None:
        """Moves the limit; it never goes back."""
        with self._changed:
            self._end_row = max(self._end_row, row)
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        """True after `stop`."""
        return self._stopped

    def rows_from(self, row: int, on_blocked: Callable[[], None]) -> int:
        """Returns how many rows from `row` on may be written, at least one; 0 when stopped.

        Calls `on_blocked` once if it has to wait. The wait has no deadline of its own: it ends with a grant, a stop, or
        the end of standard input, which ends the process.
        """
        with self._changed:
            blocked = not self._stopped and self._end_row <= row
        if blocked:
            on_blocked()
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._end_row > row)
            return 0 if self._stopped else self._end_row - row
