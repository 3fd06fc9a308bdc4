"""A shared lock with which a process that maps a set's files keeps the set in its place; it ends with the process.

The lock works on one machine only. A reader on another machine needs another means, such as a pin.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# The node touches this file whenever the set is used, so its time of change tells the last use.
HOLD_NAME = "last_used"
# The exclusive lock of another thread of this process would look like a reader's.
_LOOKING = threading.Lock()

logger = logging.getLogger(__name__)


class Hold:
    """Keeps the set in `folder` until `close`. A folder without the lock's file can't be held, which is no error."""

    def __init__(self, folder: Path) -> None:
        self._fd = -1
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(folder / HOLD_NAME, os.O_RDONLY)
            fcntl.flock(self._fd, fcntl.LOCK_SH)  # Waits out a removal, which takes a moment.

    def close(self) -> None:
        """Lets the set go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


@contextlib.contextmanager
def nobody_holds(folder: Path) -> Iterator[bool]:
    """Yields True if no process holds the set, and keeps new holders out for the block; else yields False.

    Where that can't be told, it says so in the log, and the set counts as held. One look at a time in a process: the
    block must be short.
    """
    with _LOOKING, contextlib.ExitStack() as stack:
        try:
            # Writable: file servers that emulate these locks refuse an exclusive lock on a descriptor for reading.
            fd = os.open(folder / HOLD_NAME, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            free = True
        except BlockingIOError:
            free = False
        except OSError as exc:
            logger.warning("it can't be told whether %s is read, so it stays: %s", folder, exc.strerror)
            free = False
        else:
            free = True
        yield free
