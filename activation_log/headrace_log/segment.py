"""One column of one segment: a safetensors file with a single tensor; its data start on a page boundary.

While the segment is open, the file has its full size and the suffix `.open`. Sealing cuts the file to its rows,
rewrites the header to match, and renames it. Descriptors opened before stay valid: the file is never copied.
`segment_file.py` reads it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path

from headrace_log.files import disk_full_as_typed, too_many_files_as_typed
from headrace_log.layout import ColumnSpec, open_segment_path, segment_path

# A page is 4 KiB nearly everywhere. Larger ones do no harm: readers map whole files.
DATA_OFFSET = 4096
# An open file has one page more than its rows need. Sealing gives this page back just before it writes the record, so
# that the record finds room even on a full disk.
SPARE_BYTES = 4096


def header_bytes(column: ColumnSpec, *, first_row: int, n_rows: int) -> bytes:
    """Returns the first `DATA_OFFSET` bytes of a segment file: length, JSON, and blanks, which safetensors allows."""
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
    """A mapped segment file that is being written; `data` is the writable memory behind the header."""

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
        self.first_row = first_row
        self._path = open_segment_path(folder, column, segment)
        self._sealed_path = segment_path(folder, column, segment)
        size = DATA_OFFSET + capacity_rows * column.row_bytes
        with disk_full_as_typed(folder / column.name, size), too_many_files_as_typed():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            # Reserves the blocks now: a full disk is an error here instead of a SIGBUS while rows are written.
            with disk_full_as_typed(self._path, size + spare_bytes):
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fd, 0, size + spare_bytes)
                else:
                    os.ftruncate(self._fd, size + spare_bytes)
            with too_many_files_as_typed():
                self._map = mmap.mmap(self._fd, size)  # The mapping holds a descriptor of its own.
        except BaseException:
            os.close(self._fd)
            self._path.unlink(missing_ok=True)
            raise
        self._map[:DATA_OFFSET] = header_bytes(column, first_row=first_row, n_rows=capacity_rows)
        self.data = memoryview(self._map)[DATA_OFFSET:]
        self._capacity_rows = capacity_rows

    def digest(self, n_rows: int) -> str:
        """Returns the SHA-256 of the bytes of the first `n_rows` rows."""
        return hashlib.sha256(self.data[: n_rows * self.column.row_bytes]).hexdigest()

    def flush(self) -> None:
        """Writes the rows to the disk, so that little is left for sealing to do. Raises DiskFull."""
        # Some file systems, NFS among them, notice only now that they are full.
        with disk_full_as_typed(self._path, len(self._map)):
            os.fsync(self._fd)

    def seal(self, n_rows: int) -> None:
        """Makes the first `n_rows` rows permanent under the sealed name and gives back the rest of the file.

        Raises DiskFull.
        """
        if n_rows != self._capacity_rows:
            self._map[:DATA_OFFSET] = header_bytes(self.column, first_row=self.first_row, n_rows=n_rows)
        os.ftruncate(self._fd, DATA_OFFSET + n_rows * self.column.row_bytes)
        self.flush()
        self._path.rename(self._sealed_path)
        self.close()

    def discard(self) -> None:
        """Removes the file with its rows."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Closes the file; the mapping ends with its last view."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.data.release()
