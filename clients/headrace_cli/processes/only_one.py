"""A lock file: one process at a time works in a folder. The system releases the lock when that process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from headrace_cli.output.results import note

# Errors of file systems without locks (Lustre without its flock option) and of file servers that keep none.
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_one(lock: Path, *, busy: str, remedy: str) -> Iterator[None]:
    """Holds the lock file `lock` for the block. Raises AlreadyExists with the text `busy` if another process holds it.

    Where files can't be locked, it prints a warning and goes on.
    """
    from headrace_client.errors import AlreadyExists  # noqa: PLC0415

    with lock.open("a+") as file:
        if not _lock(file, lock):
            file.seek(0)
            pid, _, host = file.read().strip().partition(" ")
            where = f" on {host}" if host and host != socket.gethostname() else ""
            raise AlreadyExists(
                f"{busy}, as process {pid or 'unknown'}{where}", reason="ALREADY_RUNNING", remedy=remedy
            )
        file.truncate(0)
        # With the host: on a file server, other machines see the file and its lock.
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            # Where files can't be locked, a number that stays would be taken for the holder's.
            file.truncate(0)


def _lock(file: IO[str], path: Path) -> bool:
    """Returns False if another process holds the lock, or removed the file before this process locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):  # Not found: the holder removed the folder when it was done.
        return False
    except OSError as exc:
        if exc.errno not in LOCKS_UNSUPPORTED:
            raise
        note(f"{path.parent} can't be locked: make sure that no other process writes there")
        return True
