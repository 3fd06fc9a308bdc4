"""Reads runs of rows of a set from its files, sealed and open, into memory of its own.

A reader keeps the files of one segment open at a time, or of several if it reads back and forth.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace_log.errors import RowsExpired
from headrace_log.files import too_many_files_as_typed
from headrace_log.index import SegmentIndex, SegmentRecord, dropped_rows
from headrace_log.layout import ColumnSpec, segment_path
from headrace_log.manifest import Manifest
from headrace_log.segment_file import SegmentFile, Stamp, stamp_of

# For readers in shuffled order: opening a segment anew for each block would take a fifth of their time.
KEPT_SEGMENTS = 16
# Columns begin at multiples of this within a run's memory, as in a message.
_ALIGNMENT = 64
# Runs in a queue, in the consumer's hands and under way; memory beyond these blocks is not kept for later runs.
_KEPT_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows `[first_row, first_row + n_rows)`; one view per column, in the reader's order."""

    first_row: int
    n_rows: int
    columns: tuple[memoryview, ...]

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.n_rows


@dataclass(frozen=True, slots=True)
class UnreadRun:
    """A run of rows that lies in files, which stay open for it. Any thread may read it, also after its reader's end."""

    first_row: int
    n_rows: int
    _at: int  # Place of the first row in its segment.
    columns: tuple[ColumnSpec, ...]
    _files: tuple[SegmentFile, ...]
    _blocks: _Blocks

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.n_rows

    def expect(self) -> None:
        """Has the system fetch the rows. Raises SetCorrupt if a file does not reach so far."""
        for file in self._files:
            file.expect(self._at, self.n_rows)

    def read(self) -> RowRun:
        """Reads the rows. Raises SetCorrupt."""
        views = self._blocks.views([column.row_bytes * self.n_rows for column in self.columns])
        for file, view in zip(self._files, views, strict=True):
            file.read_into(view, self._at)
        return RowRun(self.first_row, self.n_rows, views)

    def read_into(self, column: int, offset: int, rows: memoryview) -> None:
        """Fills memory with rows of a column, by its number, from the run's row `offset` on. Raises SetCorrupt."""
        self._files[column].read_into(rows, self._at + offset)


class SetReader:
    """Reads some columns of a set, in sealed and open segments.

    The views of a run stay valid for as long as they are used, and the caller may write to them: no file changes.
    The files of up to `keep_segments` segments stay open, and those of runs that are not read yet. An open file takes
    disk space even after it was dropped.
    """

    def __init__(self, folder: Path, columns: Sequence[str], *, keep_segments: int = 1) -> None:
        with too_many_files_as_typed():
            manifest = Manifest.load(folder)
        self._blocks = _Blocks()
        self._folder = folder
        self.columns = tuple(manifest.column(name) for name in columns)
        self._names = tuple(columns)
        self._capacity = manifest.segment_rows
        self._keep_segments = keep_segments
        self._opened: dict[int, tuple[SegmentFile, ...]] = {}  # In the order of their last use.
        self._index = SegmentIndex()
        self._sealed_rows = 0
        self.refresh()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over the reader's columns."""
        return sum(column.row_bytes for column in self.columns)

    @property
    def sealed_rows(self) -> int:
        """The border `sealed` of the reader's columns, as of the last `refresh`."""
        return self._sealed_rows

    def refresh(self) -> None:
        """Reads the borders `first_kept` and `sealed` from disk again. Raises TooManyFiles."""
        with too_many_files_as_typed():
            self.first_row = dropped_rows(self._folder)  # The border `first_kept`.
            before, self._index = self._index, self._index.refreshed(self._folder)
            # A repair takes segments off the index; else rows that were sealed stay so.
            known_rows = self._sealed_rows if self._index.n_replaced == before.n_replaced else 0
            self._sealed_rows = self._index.n_rows(self._names, known_rows=known_rows)

    def read(self, row: int, max_rows: int, *, end_row: int) -> RowRun:
        """Reads up to `max_rows` rows from `row` on, at most to `end_row` and to the end of the segment.

        `end_row` is the border `committed` as the caller knows it; `row` must lie before it. Raises RowsExpired,
        TooManyFiles and SetCorrupt.
        """
        return self.find(row, max_rows, end_row=end_row).read()

    def find(self, row: int, max_rows: int, *, end_row: int) -> UnreadRun:
        """Opens the files of the rows that `read` would read. Raises the same errors."""
        assert row < end_row, "read only what is committed"
        if row < self.first_row:
            raise RowsExpired(row, first_available_row=self.first_row)
        segment, first_row, segment_end = self._locate(row)
        n_rows = min(max_rows, end_row - row, segment_end - row)
        return UnreadRun(row, n_rows, row - first_row, self.columns, self._files(segment), self._blocks)

    def sealed_segment(self, row: int) -> SegmentRecord | None:
        """Returns the record of the segment with `row` if that is sealed in all columns, as of the last `refresh`."""
        record = self._index.find(row)
        return record if record and all(name in record.digests for name in self._names) else None

    def stamps(self, segment: int) -> Sequence[Stamp]:
        """Returns the stamps of a sealed segment's files, one a column. Raises FileNotFoundError."""
        if files := self._opened.get(segment):
            return [file.stamp for file in files]
        return [stamp_of(segment_path(self._folder, column, segment)) for column in self.columns]

    def forget_replaced_files(self) -> None:
        """Closes files of segments that a repair has set aside: their rows were written into other files since."""
        for segment, files in list(self._opened.items()):
            paths = (segment_path(self._folder, column, segment) for column in self.columns)
            try:
                in_place = all(
                    file.stamp.inode == stamp_of(path).inode for file, path in zip(files, paths, strict=True)
                )
            except OSError:
                in_place = False
            if not in_place:
                del self._opened[segment]

    def sealed_after(self, row: int) -> int:
        """Returns the rows from `row` to the end of its segment if that is sealed in all columns, else 0.

        Opens no file. Raises RowsExpired.
        """
        if row >= self._sealed_rows:
            self.refresh()
        if row < self.first_row:
            raise RowsExpired(row, first_available_row=self.first_row)
        if row >= self._sealed_rows:
            return 0
        record = self._index.find(row)
        return record.end_row - row if record else 0

    def forget_files(self) -> None:
        """Closes all files: the writer died, or a segment was damaged, and its rows are written into another file."""
        self._close_files()
        self.refresh()

    def close(self) -> None:
        """Closes all files."""
        self._close_files()

    def _locate(self, row: int) -> tuple[int, int, int]:
        """Returns number, first row and end row of the segment with `row`."""
        if row >= self._sealed_rows:
            self.refresh()
        if row < self._sealed_rows and (record := self._index.find(row)):
            return record.segment, record.first_row, record.end_row
        # Not recorded yet: the segment that is being written, or the one before it while it is being sealed.
        segment = self._index.n_before(self._sealed_rows)
        first_row = self._sealed_rows
        while row >= first_row + self._rows_of(segment):
            first_row += self._rows_of(segment)
            segment += 1
        return segment, first_row, first_row + self._rows_of(segment)

    def _rows_of(self, segment: int) -> int:
        records = self._index.records
        return records[segment].n_rows if segment < len(records) else self._capacity

    def _files(self, segment: int) -> tuple[SegmentFile, ...]:
        files = self._opened.pop(segment, None)
        if files is None:
            self._close_files(down_to=self._keep_segments - 1)
            files = tuple(SegmentFile(self._folder, column, segment) for column in self.columns)
        self._opened[segment] = files
        return files

    def _close_files(self, *, down_to: int = 0) -> None:
        """Closes the segments that were not used for the longest time, once no run is left that is to be read."""
        while len(self._opened) > down_to:
            del self._opened[next(iter(self._opened))]


class _Blocks:
    """Memory for runs, used again once no view of it is left: fresh pages would take half of a fast reader's time."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def views(self, sizes: Sequence[int]) -> tuple[memoryview, ...]:
        """Returns writable memory of these sizes, in one block."""
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        block = self._free.pop() if self._free else np.empty(end, np.uint8)
        if block.nbytes < end:
            block = np.empty(end, np.uint8)
        lent = block[:end]  # Each view of its memory holds this array, which ends with the last of them.
        weakref.finalize(lent, self._take_back, block).atexit = False
        memory = memoryview(lent.data)
        return tuple(memory[start : start + size] for start, size in zip(starts, sizes, strict=True))

    def _take_back(self, block: NDArray[np.uint8]) -> None:
        if len(self._free) < _KEPT_BLOCKS:
            self._free.append(block)
