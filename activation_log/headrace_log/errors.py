"""The errors of an activation log.

LogError
├── SetCorrupt        a file contradicts the manifest or the index
├── DigestMismatch    a sealed segment's bytes changed after they were written
├── DiskFull          no space for the next file or record
├── TooManyFiles      no free descriptor to open a file
└── RowsExpired       a WINDOW set has dropped these rows
"""

from __future__ import annotations

from pathlib import Path


class LogError(Exception):
    """Base of all errors of the activation log."""


class SetCorrupt(LogError):
    """A set's files contradict one another; deleting the set's folder makes the next extraction recompute it."""


class DigestMismatch(LogError):
    """A sealed segment differs from its digest."""

    def __init__(self, path: Path, *, expected: str, actual: str) -> None:
        super().__init__(f"{path} has SHA-256 {actual}, recorded was {expected}; delete the set to recompute it")
        self.path = path
        self.expected = expected
        self.actual = actual


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
