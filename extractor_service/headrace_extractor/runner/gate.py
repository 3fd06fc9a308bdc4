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
        if blocked:  # Outside of the lock: the callback writes to a pipe that may be full.
            on_blocked()
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._end_row > row)
            return 0 if self._stopped else self._end_row - row


class Gates:
    """Gates of the extractions that run or wait, by set id.

    The server may send the next run of a set before the runner has closed the gate of its last run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, Gate] = {}

    def open(self, set_id: str, gate: Gate) -> None:
        """Directs commands for this id to this gate from now on."""
        with self._lock:
            self._by_id[set_id] = gate

    def find(self, set_id: str) -> Gate | None:
        """Returns the newest gate of an id; None if no run of it is left."""
        with self._lock:
            return self._by_id.get(set_id)

    def close(self, gate: Gate) -> None:
        """Forgets this gate; a newer gate of the same id stays."""
        with self._lock:
            self._by_id = {key: kept for key, kept in self._by_id.items() if kept is not gate}
