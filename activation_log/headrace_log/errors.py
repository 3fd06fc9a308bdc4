"""The errors of an activation log.

LogError
├── SetCorrupt        a file contradicts the manifest or the index
├── DigestMismatch    a sealed segment is not as it was sealed
├── DiskFull          no space for the next file or record
├── TooManyFiles      no free descriptor to open a file
├── RowsExpired       a WINDOW set has dropped these rows
├── LockHeld          another process holds the lock
└── NoLocks           the file system keeps no locks
"""

from __future__ import annotations

from pathlib import Path


class LogError(Exception):
    """Base of all errors of the activation log."""


class SetCorrupt(LogError):
    """A set's files contradict one another; deleting the set's folder makes the next extraction recompute it."""


class DigestMismatch(LogError):
    """A sealed segment of a column is damaged: `what` is wrong with its file."""

    def __init__(self, path: Path, what: str, *, column: str, segment: int, first_row: int, n_rows: int) -> None:
        super().__init__(
            f"{path} {what}: rows {first_row} to {first_row + n_rows} of {column} are damaged; start the extraction "
            "again, which computes them anew"
        )
        self.path = path
        self.column = column
        self.segment = segment
        self.first_row = first_row
        self.n_rows = n_rows


class DiskFull(LogError):
    """No space for the next segment, or for the record of one."""

    def __init__(self, path: Path, *, required_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"the disk of {path} has {free_bytes} bytes free, the next write needs {required_bytes}; free some space"
        )
        self.path = path
        self.required_bytes = required_bytes
        self.free_bytes = free_bytes


class TooManyFiles(LogError):
    """This process, or the machine, has as many files open as it may; each mapped segment counts as one."""

    def __init__(self, *, max_files: int) -> None:
        super().__init__(
            f"no more files can be opened, of at most {max_files} in this process; read fewer columns or streams at "
            "once, or start it with a higher limit (ulimit -n)"
        )
        self.max_files = max_files


class RowsExpired(LogError):
    """The rows lie before `first_kept`: a WINDOW set has dropped them."""

    def __init__(self, row: int, *, first_available_row: int) -> None:
        super().__init__(f"row {row} is no longer kept; the first row still there is {first_available_row}")
        self.row = row
        self.first_available_row = first_available_row


class LockHeld(LogError):
    """Another process holds the lock."""

    def __init__(self, path: Path, *, holder: str) -> None:
        super().__init__(f"process {holder or 'unknown'} holds {path}; wait until it ends, or end it")
        self.path = path
        self.holder = holder


class NoLocks(LogError):
    """The file system keeps no locks, without which two processes could write the same files."""

    def __init__(self, path: Path, *, why: str) -> None:
        super().__init__(
            f"{path} can't be locked ({why}); use a file system with locks, such as a local disk, or mount this one "
            "with them"
        )
        self.path = path
