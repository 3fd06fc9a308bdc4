"""Computes the statistics of the columns that a writer writes, segment by segment, while digests are computed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace_log.index import SegmentIndex, dropped_rows
from headrace_log.layout import ColumnSpec, column_folder
from headrace_log.manifest import Manifest
from headrace_log.segment import OpenSegment
from headrace_log.segment_file import SegmentFile
from headrace_log.statistics import (
    SUFFIX,
    ColumnStatistics,
    Summarize,
    file_bytes,
    last_segment,
    read_statistics,
    save_statistics,
    statistics_path,
    summary_to_json,
)

# Half the cores keep up with the digests beside them on any machine; four do with a GPU.
_MAX_THREADS = 4


class StatisticsWriter:
    """Keeps the statistics of the hookpoints among `columns` as segments are sealed; of no column without `summarize`.

    Once a WINDOW set has dropped rows that were not summarised, their columns never have statistics again. The rows of
    a hole that a repair left are in the statistics already: they are computed again with the same bits.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, columns: Sequence[ColumnSpec], summarize: Summarize | None
    ) -> None:
        self._folder = folder
        self._columns = tuple(c for c in columns if summarize and c in manifest.hookpoints)
        self._manifest = manifest
        self._summarize = summarize
        self._so_far: dict[str, ColumnStatistics | None] = {}
        self._covered_rows: dict[str, int] = {}  # Rows that a column's statistics were over when the writer began.
        n_threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2, len(self._columns)))
        self._pool = ThreadPoolExecutor(max_workers=n_threads, thread_name_prefix="statistics")

    def spare_bytes(self, column: ColumnSpec) -> int:
        """Returns the disk space that sealing a segment of `column` needs for its statistics."""
        return file_bytes(column) if column in self._columns else 0

    def start(self, segments: Sequence[OpenSegment], n_rows: int) -> Mapping[str, Future[ColumnStatistics]]:
        """Begins to summarise the first `n_rows` rows of open segments; returns the results to come, by column."""
        memory = {segment.column.name: segment.data[: n_rows * segment.column.row_bytes] for segment in segments}
        end_row = segments[0].first_row + n_rows
        new = [column for column in self._columns if self._covered_rows.get(column.name, 0) < end_row]
        return {column.name: self._submit(column, memory) for column in new}

    def save(self, segment: int, parts: Mapping[str, Future[ColumnStatistics]], index: SegmentIndex) -> None:
        """Writes the statistics up to the end of `segment`, which is recorded next; `index` ends before `segment`."""
        for column in self._columns:
            if column.name not in parts:
                continue
            before, part = self._before(column, segment, index), parts[column.name].result()
            if before is None and segment:
                self._so_far[column.name] = None
                continue
            total = self._so_far[column.name] = before.merged(part) if before else part
            save_statistics(statistics_path(self._folder, column, segment), total)

    def recorded(self, segment: int) -> None:
        """Removes the statistics of earlier segments, now that `segment` is recorded."""
        for column in self._columns:
            for number in self._numbers(column):
                if number < segment:
                    statistics_path(self._folder, column, number).unlink(missing_ok=True)

    def remove_leftovers(self, index: SegmentIndex) -> None:
        """Removes the files that a crash left: of segments that were not recorded, and of earlier segments."""
        for column in self._columns:
            recorded = [record.segment for record in index.records if column.name in record.digests]
            last = recorded[-1] if recorded else -1
            # Behind the last one may lie those of a segment that a repair has set aside.
            for number in self._numbers(column):
                if last <= number < len(index.records):
                    found = self._recorded_up_to(column, number)
                    self._covered_rows[column.name] = found.count if found else 0
                else:
                    statistics_path(self._folder, column, number).unlink(missing_ok=True)

    def summary(self, index: SegmentIndex) -> dict[str, Mapping[str, Any]]:
        """Manifest entries of the columns that have statistics."""
        entries = {}
        for column in self._columns:
            segment = last_segment(index, column)
            if segment >= 0 and (found := self._recorded_up_to(column, segment)):
                entries[column.name] = summary_to_json(self._folder, column, segment, found)
        return entries

    def close(self) -> None:
        """Ends the threads; work that has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, column: ColumnSpec, memory: Mapping[str, memoryview]) -> Future[ColumnStatistics]:
        assert self._summarize is not None
        scales = memory[column.scale_column] if column.scale_column else None
        return self._pool.submit(self._summarize, column, memory[column.name], scales)

    def _before(self, column: ColumnSpec, segment: int, index: SegmentIndex) -> ColumnStatistics | None:
        """Returns the statistics of the rows before a segment; None at segment 0, or if they are lost for good."""
        if not segment:
            return None
        if column.name not in self._so_far:
            self._so_far[column.name] = self._recorded_up_to(column, segment - 1) or self._from_files(
                column, segment, index
            )
        return self._so_far[column.name]

    def _recorded_up_to(self, column: ColumnSpec, segment: int) -> ColumnStatistics | None:
        return read_statistics(statistics_path(self._folder, column, segment), column)

    def _from_files(self, column: ColumnSpec, segment: int, index: SegmentIndex) -> ColumnStatistics | None:
        """Summarises sealed segments from their files: an older version wrote these, without statistics."""
        if dropped_rows(self._folder):
            return None  # Some of the files are gone.
        total: ColumnStatistics | None = None
        scale = self._manifest.column(column.scale_column) if column.scale_column else None
        for record in index.records[:segment]:
            memory = {c.name: memoryview(bytearray(record.n_rows * c.row_bytes)) for c in (column, scale) if c}
            for name, rows in memory.items():
                SegmentFile(self._folder, self._manifest.column(name), record.segment).read_into(rows, 0)
            part = self._submit(column, memory).result()
            total = total.merged(part) if total else part
        return total

    def _numbers(self, column: ColumnSpec) -> list[int]:
        """Numbers of the segments that have a statistics file."""
        names = (path.name.removesuffix(SUFFIX) for path in column_folder(self._folder, column).glob(f"*{SUFFIX}"))
        return sorted(int(name) for name in names if name.isdigit())
