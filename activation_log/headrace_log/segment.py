"""One column of one segment: a safetensors file with a single tensor whose data start on a page boundary.

While it is open it has its full size and the suffix `.open`; sealing cuts it to its rows, rewrites the header to match,
and renames it. Mappings made while it was open stay valid: the file is never copied.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path

from headrace_log.errors import SetCorrupt
from headrace_log.files import disk_full_as_typed, too_many_files_as_typed
from headrace_log.layout import ColumnSpec, open_segment_path, segment_path

# Pages are 4 KiB nearly everywhere; readers map whole files, so larger pages do no harm.
DATA_OFFSET = 4096
# An open file has a page more than its rows need. Sealing gives it back just before the sealing is recorded, so that
# there is room for the record on a disk that is full by then.
SPARE_BYTES = 4096


def header_bytes(column: ColumnSpec, *, first_row: int, n_rows: int) -> bytes:
    """The first `DATA_OFFSET` bytes of a segment file: length, JSON, and the blanks safetensors allows behind it."""
    shape = [n_rows] if column.is_provenance else [n_rows, column.width]
    document = {
        "__metadata__": {"format": "headrace", "first_row": str(first_row)},
        column.name: {
            "dtype": column.dtype.safetensors_name,
            "shape": shape,
            "data_offsets": [0, n_rows * column.row_bytes],
        },
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    length = DATA_OFFSET - 8
    if len(text) > length:
        raise ValueError(f"the header of column {column.name} takes {len(text)} bytes, more than {length}")
    return length.to_bytes(8, "little") + text.ljust(length)


class OpenSegment:
    """A segment file being written, mapped; `data` is the writable memory behind the header."""

    def __init__(
        self,
        folder: Path,
        column: ColumnSpec,
        *,
        segment: int,
        first_row: int,
        capacity_rows: int,
        spare_bytes: int = SPARE_BYTES,
    ) -> None:
        self.column = column
        self._first_row = first_row
        self._path = open_segment_path(folder, column, segment)
        self._sealed_path = segment_path(folder, column, segment)
        size = DATA_OFFSET + capacity_rows * column.row_bytes
        with disk_full_as_typed(folder / column.name, size), too_many_files_as_typed():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _allocate(self._fd, self._path, size + spare_bytes)
            with too_many_files_as_typed():
                self._map = mmap.mmap(self._fd, size)  # It has a descriptor of its own.
        except BaseException:
            os.close(self._fd)
            self._path.unlink(missing_ok=True)
            raise
        self._map[:DATA_OFFSET] = header_bytes(column, first_row=first_row, n_rows=capacity_rows)
        self.data = memoryview(self._map)[DATA_OFFSET:]
        self._capacity_rows = capacity_rows

    def digest(self, n_rows: int) -> str:
        """SHA-256 of the bytes of the first `n_rows` rows."""
        return hashlib.sha256(self.data[: n_rows * self.column.row_bytes]).hexdigest()

    def flush(self) -> None:
        """Brings what was written to the disk, so that sealing has little left to do. Raises DiskFull."""
        # Some file systems, NFS among them, find out only now.
        with disk_full_as_typed(self._path, len(self._map)):
            os.fsync(self._fd)

    def seal(self, n_rows: int) -> None:
        """Makes the first `n_rows` rows permanent under the sealed name, and gives back what the file has beyond.

        Raises DiskFull.
        """
        if n_rows != self._capacity_rows:
            self._map[:DATA_OFFSET] = header_bytes(self.column, first_row=self._first_row, n_rows=n_rows)
        os.ftruncate(self._fd, DATA_OFFSET + n_rows * self.column.row_bytes)
        self.flush()
        self._path.rename(self._sealed_path)
        self.close()

    def discard(self) -> None:
        """Gives the rows up."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Closes the file; the mapping goes when the last view of it does."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.data.release()


def map_segment(folder: Path, column: ColumnSpec, segment: int, *, private: bool = False) -> mmap.mmap:
    """Maps a segment file, sealed or open, for reading; with `private`, what is written stays in this mapping.

    The mapping keeps a descriptor of its own. Raises TooManyFiles and SetCorrupt.
    """
    access = mmap.ACCESS_COPY if private else mmap.ACCESS_READ
    sealed, opened = segment_path(folder, column, segment), open_segment_path(folder, column, segment)
    for path in (sealed, opened, sealed):  # It may be renamed between the first and the second look.
        try:
            with too_many_files_as_typed(), path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=access)
        except FileNotFoundError:
            continue
        if hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_SEQUENTIAL)
        return mapping
    raise SetCorrupt(f"{sealed} is missing; delete the set to recompute it")


def file_digest(path: Path) -> str:
    """SHA-256 of a sealed file's data, as `segments.jsonl` records it."""
    with path.open("rb") as file:
        file.seek(DATA_OFFSET)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _allocate(fd: int, path: Path, size: int) -> None:
    """Reserves the blocks now: a full disk is an error here instead of a SIGBUS while rows are written."""
    with disk_full_as_typed(path, size):
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
