"""Reads runs of rows of a set as views of its mapped files; nothing is copied.

A reader maps one segment at a time, or several if it reads back and forth. It gives back the pages that it has passed,
so that its memory does not grow with the set.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_log.errors import RowsExpired, SetCorrupt
from headrace_log.files import too_many_files_as_typed
from headrace_log.index import SegmentIndex, dropped_rows
from headrace_log.layout import ColumnSpec
from headrace_log.manifest import Manifest
from headrace_log.segment import DATA_OFFSET, map_segment

# Passed pages are given back in steps of this size: one system call for several chunks of 1 MiB.
_RELEASE_BYTES = 4 * 1024 * 1024
# For readers in shuffled order: mapping a segment anew for each block would take a fifth of their time.
KEPT_SEGMENTS = 16


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows `[first_row, first_row + n_rows)`; one read-only view per column, in the reader's order."""

    first_row: int
    n_rows: int
    columns: tuple[memoryview, ...]

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.n_rows


class _MappedColumn:
    def __init__(self, folder: Path, column: ColumnSpec, segment: int, n_rows: int, *, handed_on: bool) -> None:
        self._map = map_segment(folder, column, segment, private=handed_on)
        self._handed_on = handed_on
        self._row_bytes = column.row_bytes
        self._claimed = 0, 0  # Range of the file, in bytes, whose pages this process may still hold.
        if len(self._map) < DATA_OFFSET + n_rows * column.row_bytes:
            raise SetCorrupt(f"{folder}: segment {segment} of {column.name} is cut short; delete the set")
        self._data = memoryview(self._map)[DATA_OFFSET:]

    def view(self, at: int, n_rows: int) -> memoryview:
        """Returns `n_rows` rows from the segment's row `at` on, counted from 0."""
        start, end = at * self._row_bytes, (at + n_rows) * self._row_bytes
        if not self._handed_on:
            self._release_passed_pages(DATA_OFFSET + start, DATA_OFFSET + end)
        return self._data[start:end]

    def _release_passed_pages(self, start: int, end: int) -> None:
        """Takes pages before `start` out of this process's memory; they stay in the page cache."""
        first, last = self._claimed
        page_start = start - start % mmap.PAGESIZE
        if start != last:  # A jump: no page of the rows before it is needed now.
            self._release(first, last)
            first = page_start
        elif page_start - first >= _RELEASE_BYTES:
            self._release(first, page_start)
            first = page_start
        self._claimed = first, end

    def _release(self, start: int, end: int) -> None:
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmaps; views that are still in use keep their memory until they go."""
        self._data.release()
        with contextlib.suppress(BufferError):
            self._map.close()


class SetReader:
    """Reads some columns of a set, in sealed and open segments.

    Pages before the last run are given back. With `handed_on` they are kept, and the caller may write to the views: the
    written values stay in its memory, no file changes.
    Up to `keep_segments` segments stay mapped. A mapped segment takes disk space even after it was dropped.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], *, handed_on: bool = False, keep_segments: int = 1
    ) -> None:
        with too_many_files_as_typed():
            manifest = Manifest.load(folder)
        self._handed_on = handed_on
        self._folder = folder
        self.columns = tuple(manifest.column(name) for name in columns)
        self._names = tuple(columns)
        self._capacity = manifest.segment_rows
        self._keep_segments = keep_segments
        self._mapped: dict[int, tuple[_MappedColumn, ...]] = {}  # In the order of their last use.
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
            self._index = self._index.refreshed(self._folder)
            self._sealed_rows = self._index.n_rows(self._names, known_rows=self._sealed_rows)

    def read(self, row: int, max_rows: int, *, end_row: int) -> RowRun:
        """Reads up to `max_rows` rows from `row` on, at most to `end_row` and to the end of the segment.

        `end_row` is the border `committed` as the caller knows it; `row` must lie before it. Raises RowsExpired,
        TooManyFiles and SetCorrupt.
        """
        assert row < end_row, "read only what is committed"
        if row < self.first_row:
            raise RowsExpired(row, first_available_row=self.first_row)
        segment, first_row, segment_end = self._locate(row)
        n_rows = min(max_rows, end_row - row, segment_end - row)
        mapped = self._map(segment, min(end_row, segment_end) - first_row)
        views = tuple(column.view(row - first_row, n_rows) for column in mapped)
        return RowRun(row, n_rows, views)

    def sealed_after(self, row: int) -> int:
        """Returns the rows from `row` to the end of its segment if that is sealed in all columns, else 0.

        Maps no file. Raises RowsExpired.
        """
        if row >= self._sealed_rows:
            self.refresh()
        if row < self.first_row:
            raise RowsExpired(row, first_available_row=self.first_row)
        if row >= self._sealed_rows:
            return 0
        record = self._index.find(row)
        return record.end_row - row if record else 0

    def forget_open_segment(self) -> None:
        """Unmaps everything: the writer died, and the next one writes the open segment into another file."""
        self._unmap()
        self.refresh()

    def close(self) -> None:
        """Unmaps everything."""
        self._unmap()

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

    def _map(self, segment: int, n_rows: int) -> tuple[_MappedColumn, ...]:
        mapped = self._mapped.pop(segment, None)
        if mapped is None:
            self._unmap(down_to=self._keep_segments - 1)
            mapped = tuple(
                _MappedColumn(self._folder, column, segment, n_rows, handed_on=self._handed_on)
                for column in self.columns
            )
        self._mapped[segment] = mapped
        return mapped

    def _unmap(self, *, down_to: int = 0) -> None:
        """Unmaps the segments that were not used for the longest time."""
        while len(self._mapped) > down_to:
            for column in self._mapped.pop(next(iter(self._mapped))):
                column.close()
