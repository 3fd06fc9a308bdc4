"""A shared lock by which a process that maps a set's files keeps it where it is; it goes with the process.

It holds on one machine. Who reads the files elsewhere must have the set kept by other means.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# The node touches it whenever the set is used.
HOLD_NAME = "last_used"
# A lock of the same process, from another thread, would be taken for a reader's.
_LOOKING = threading.Lock()


class Hold:
    """Keeps the set in `folder` until `close`. A folder without the file to lock can't be held; that is no error."""

    def __init__(self, folder: Path) -> None:
        self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(folder / HOLD_NAME, os.O_RDONLY)
            fcntl.flock(self._fd, fcntl.LOCK_SH)  # Waits for a removal under way, which takes a moment.

    def close(self) -> None:
        """Lets the set go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


@contextlib.contextmanager
def nobody_holds(folder: Path) -> Iterator[bool]:
    """Yields True, and lets nobody in for the block, if no process holds the set; else False.

    One look at a time in a process: the block must be short.
    """
    with _LOOKING:
        yield from _locked(folder)


def _locked(folder: Path) -> Iterator[bool]:
    try:
        fd = os.open(folder / HOLD_NAME, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
