"""A segment's file as readers see it: read by `pread`, never mapped.

A mapped file that shrinks would end the whole process by SIGBUS. A read beyond the end is only short.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from headrace_log.errors import DigestMismatch, SetCorrupt
from headrace_log.files import UNREADABLE, too_many_files_as_typed
from headrace_log.index import SegmentRecord
from headrace_log.layout import ColumnSpec, open_segment_path, segment_path
from headrace_log.segment import DATA_OFFSET, header_bytes


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's inode, size and times: equal for as long as nothing was written to the file."""

    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


def stamp_of(file: int | Path) -> Stamp:
    """Returns the stamp of a path or a descriptor."""
    stat = os.stat(file)  # noqa: PTH116 -- of a descriptor too
    return Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class SegmentFile:
    """One column of one segment, sealed or open, opened for reading. Raises TooManyFiles and SetCorrupt."""

    def __init__(self, folder: Path, column: ColumnSpec, segment: int) -> None:
        self._column = column
        self._fd = -1
        sealed, opened = segment_path(folder, column, segment), open_segment_path(folder, column, segment)
        for path in (sealed, opened, sealed):  # The writer may rename it between two looks.
            try:
                with too_many_files_as_typed():
                    self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except PermissionError as exc:
                raise SetCorrupt(f"{path} may not be read; give this process's user the right to read it") from exc
            self.path = path
            return
        raise SetCorrupt(f"{sealed} is missing; start the extraction again, which computes its rows anew")

    @property
    def stamp(self) -> Stamp:
        """The file's stamp now."""
        return stamp_of(self._fd)

    def expect(self, at: int, n_rows: int) -> None:
        """Has the system fetch rows that are read soon. Raises SetCorrupt if the file does not reach so far."""
        offset, n_bytes = DATA_OFFSET + at * self._column.row_bytes, n_rows * self._column.row_bytes
        if os.fstat(self._fd).st_size < offset + n_bytes:
            raise SetCorrupt(f"{self.path} is cut short; start the extraction again, which computes its rows anew")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, rows: memoryview, at: int) -> None:
        """Fills `rows` with the rows from the segment's row `at` on, counted from 0. Raises SetCorrupt."""
        offset, done = DATA_OFFSET + at * self._column.row_bytes, 0
        while done < len(rows):
            try:
                n_read = os.preadv(self._fd, [rows[done:] if done else rows], offset + done)
            except OSError as exc:
                if exc.errno not in UNREADABLE:
                    raise
                raise SetCorrupt(f"{self.path} can't be read: {exc.strerror}") from exc
            if n_read == 0:
                raise SetCorrupt(f"{self.path} is cut short; start the extraction again, which computes its rows anew")
            done += n_read

    def close(self) -> None:
        """Closes the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


def check_sealed(folder: Path, column: ColumnSpec, record: SegmentRecord, *, digest: bool = True) -> Stamp:
    """Compares a sealed segment's file with its record: size, header and, with `digest`, every byte.

    Returns the stamp of the file that was compared. Raises DigestMismatch.
    """
    path = segment_path(folder, column, record.segment)

    def damage(what: str) -> DigestMismatch:
        return DigestMismatch(
            path,
            what,
            column=column.name,
            segment=record.segment,
            first_row=record.first_row,
            n_rows=record.n_rows,
        )

    try:
        with too_many_files_as_typed(), path.open("rb", buffering=0) as file:
            before = stamp_of(file.fileno())
            if before.size_bytes != DATA_OFFSET + record.n_rows * column.row_bytes:
                raise damage(f"has {before.size_bytes} bytes, which is not its size")
            if file.read(DATA_OFFSET) != header_bytes(column, first_row=record.first_row, n_rows=record.n_rows):
                raise damage("is not headed as this segment of this column")
            if digest:
                actual, expected = hashlib.file_digest(file, "sha256").hexdigest(), record.digests[column.name]
                if actual != expected:
                    raise damage(f"has SHA-256 {actual}, recorded was {expected}")
            return before  # A file that was written to meanwhile has another stamp by now.
    except FileNotFoundError:
        raise damage("is missing") from None
    except PermissionError as exc:
        raise SetCorrupt(f"{path} may not be read; give the extractor's user the right to read it") from exc
    except OSError as exc:
        if exc.errno not in UNREADABLE:
            raise
        raise damage(f"can't be read ({exc.strerror})") from exc


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a sealed file's data, as recorded in `segments.jsonl`."""
    with path.open("rb") as file:
        file.seek(DATA_OFFSET)
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_on_file(path: Path, column: ColumnSpec) -> tuple[int, int] | None:
    """Returns first row and row count as a segment's file states them; None if its header and size don't agree."""
    try:
        with path.open("rb") as file:
            header, size = file.read(DATA_OFFSET), os.fstat(file.fileno()).st_size
    except OSError:
        return None
    n_rows, rest = divmod(size - DATA_OFFSET, column.row_bytes)
    if rest or n_rows < 1:
        return None
    mark = b'"first_row":"'
    at = header.find(mark) + len(mark)
    digits = header[at : header.find(b'"', at)]
    if not digits.isdigit() or header != header_bytes(column, first_row=int(digits), n_rows=n_rows):
        return None
    return int(digits), n_rows
