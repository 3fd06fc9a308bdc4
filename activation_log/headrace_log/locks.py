"""Exclusive locks between processes, by a lock file. The system releases a lock when its process ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Self

from headrace_log.errors import LockHeld, NoLocks

# In a set's folder: held by the process that writes its segments or repairs its index.
WRITER_LOCK_NAME = "writer.lock"
_POLL_S = 0.05


class FileLock:
    """Holds the lock file `path` until `close`. Raises LockHeld if another holder keeps it for `wait_s` seconds.

    Raises NoLocks on file systems without locks. The file holds the process id of its holder, and stays.
    """

    def __init__(self, path: Path, *, wait_s: float = 0.0) -> None:
        self._fd = -1
        # Writable: file servers that emulate these locks refuse an exclusive lock on a descriptor for reading.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(fd, path, until=time.monotonic() + wait_s)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def close(self) -> None:
        """Releases the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(fd: int, path: Path, *, until: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise LockHeld(path, holder=os.pread(fd, 20, 0).decode("ascii", "replace")) from None
            time.sleep(_POLL_S)
        except OSError as exc:  # ENOLCK, ENOSYS and EOPNOTSUPP: file servers and Lustre without locks.
            raise NoLocks(path, why=exc.strerror or str(exc)) from exc
        else:
            return
