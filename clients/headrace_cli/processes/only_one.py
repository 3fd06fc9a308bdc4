"""A lock for what only one process may do at a time in a folder; it goes with the process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from headrace_cli.output.results import note

# Of file systems that know no locks, and of servers of files that keep none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_one(lock: Path, *, busy: str, remedy: str) -> Iterator[None]:
    """Holds the file `lock` for the block. Raises AlreadyExists, which says `busy`, while another process does.

    Where files can't be locked it says so, and goes on.
    """
    from headrace_client.errors import AlreadyExists  # noqa: PLC0415

    with lock.open("a+") as file:
        if not _is_ours(file, lock):
            file.seek(0)
            raise AlreadyExists(
                f"{busy}, as process {file.read().strip() or 'unknown'}", reason="ALREADY_RUNNING", remedy=remedy
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _is_ours(file: IO[str], lock: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except (BlockingIOError, FileNotFoundError):  # Not found: its holder took the folder away just now.
        return False
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise
        note(f"{lock.parent} can't be locked: see to it that no other process writes there")
        return True
