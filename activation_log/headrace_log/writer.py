"""Appends rows to a set: straight into mapped segment files, sealed in the background.

One writer per set at a time, which a lock file ensures. `commit` moves the border `committed` (the package's docstring
has the picture), which is `next_row`; a sealing moves `sealed`. A crash at any point leaves the sealed segments; the
next writer removes the files of open ones and goes on at `sealed`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from headrace_log.errors import SetCorrupt
from headrace_log.files import fsync_folder
from headrace_log.index import SegmentIndex, SegmentRecord
from headrace_log.layout import OPEN_SUFFIX, ColumnSpec, column_folder
from headrace_log.locks import WRITER_LOCK_NAME, FileLock
from headrace_log.manifest import Manifest
from headrace_log.segment import SPARE_BYTES, OpenSegment
from headrace_log.statistics import Summarize
from headrace_log.statistics_writer import StatisticsWriter

# A writer whose server was killed ends as soon as it notices, at the latest after the batch at hand.
_WRITER_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Memory for `n_rows` rows: one writable view per column, `n_rows * row_bytes` bytes each."""

    n_rows: int
    columns: Mapping[str, memoryview]


class SetWriter:
    """Appends rows of `columns` (all columns of the set by default), and their statistics with `summarize`.

    Where a repair has left a hole in the columns, it writes the rows of the hole; the caller commits none behind.
    Raises LockHeld if another writer keeps the set, NoLocks and SetCorrupt.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, columns: Sequence[ColumnSpec], summarize: Summarize | None = None
    ) -> None:
        self._lock = FileLock(folder / WRITER_LOCK_NAME, wait_s=_WRITER_WAIT_S)
        try:
            self._begin(folder, manifest, columns, summarize)
        except BaseException:
            self._lock.close()
            raise

    def _begin(
        self, folder: Path, manifest: Manifest, columns: Sequence[ColumnSpec], summarize: Summarize | None
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._columns = tuple(columns)
        self._index = SegmentIndex.load(folder)
        self._open: tuple[OpenSegment, ...] = ()
        self._open_first_row = 0
        self._open_rows = 0
        self._open_segment = 0
        self._resume_at_commit: Mapping[str, Any] = {}
        self._non_finite: Counter[str] = Counter()
        self._sealing: Future[SegmentIndex] | None = None
        # On a full disk the bytes that a sealing gives back are for its record: no segment is opened meanwhile.
        self._disk = Lock()
        # One thread: segments are sealed in order.
        self._sealer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seal")
        self.next_row = self._index.n_rows([column.name for column in self._columns])
        self._next_segment = self._index.n_before(self.next_row)
        for column in self._columns:
            # Files without a record: open ones, and those renamed just before a crash.
            recorded = {f"{r.segment:08d}.safetensors" for r in self._index.records if column.name in r.digests}
            for path in column_folder(folder, column).glob("*.safetensors*"):
                if path.name.endswith(OPEN_SUFFIX) or path.name not in recorded:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._statistics = StatisticsWriter(folder, manifest, self._columns, summarize)
        self._statistics.remove_leftovers(self._index)

    @classmethod
    def open(cls, folder: Path, columns: Sequence[str] | None = None, summarize: Summarize | None = None) -> SetWriter:
        """Opens an existing set at the border `sealed` of `columns`; by default of all its columns."""
        manifest = Manifest.load(folder)
        names = [column.name for column in manifest.columns] if columns is None else columns
        return cls(folder, manifest, [manifest.column(name) for name in names], summarize)

    @property
    def resume(self) -> Mapping[str, Any] | None:
        """Resume point stored with the segment that ends at `next_row`; None at the start of the set."""
        record = self._index.find(self.next_row - 1) if self.next_row else None
        return record.resume if record else None

    def reserve(self, n_rows: int) -> Reservation:
        """Offers memory for 1 to `n_rows` rows; fewer than asked for at the end of a segment. Raises DiskFull."""
        if not self._open:
            self._begin_segment()
        n_rows = min(n_rows, self._capacity - self._open_rows)
        views = {}
        for segment in self._open:
            row_bytes = segment.column.row_bytes
            views[segment.column.name] = segment.data[
                self._open_rows * row_bytes : (self._open_rows + n_rows) * row_bytes
            ]
        return Reservation(n_rows, views)

    @property
    def n_non_finite(self) -> int:
        """Number of NaN or infinite values sealed in the writer's columns."""
        return self._index.n_non_finite([column.name for column in self._columns], self.next_row)

    def commit(self, n_rows: int, resume: Mapping[str, Any], non_finite: Mapping[str, int] | None = None) -> None:
        """Makes the first `n_rows` reserved rows readable. From `resume` the row behind them can be produced again.

        `non_finite` is the number of NaN or infinite values in these rows, by column.
        """
        assert 0 < n_rows <= self._capacity - self._open_rows, "commit what was reserved"
        self._open_rows += n_rows
        self.next_row += n_rows
        self._resume_at_commit = dict(resume)
        self._non_finite.update(non_finite or {})
        if self._open_rows == self._capacity:
            self.seal()

    def seal(self) -> None:
        """Seals the open segment in the background, even a short one; an empty segment is discarded.

        A segment that exists in other columns is sealed whole or not at all: the rows of a short one are given up, and
        `next_row` goes back.
        """
        if not self._open:
            return
        self.settle()
        segments, self._open = self._open, ()
        if self._open_rows == 0 or (self._is_known and self._open_rows < self._capacity):
            for segment in segments:
                segment.discard()
            self.next_row = self._open_first_row
            return
        record = SegmentRecord(
            segment=self._open_segment,
            first_row=self._open_first_row,
            n_rows=self._open_rows,
            digests={},
            resume=self._resume_at_commit,
            non_finite=dict(self._non_finite),
        )
        self._next_segment = self._open_segment + 1
        self._sealing = self._sealer.submit(self._seal_files, segments, record)

    def settle(self) -> None:
        """Waits until the segment in the background is sealed, so that at most one is under way.

        After a failed sealing no later segment is sealed: every further call raises the same error.
        """
        if self._sealing is not None:
            self._index = self._sealing.result()
            self._sealing = None

    def finish(self) -> None:
        """Seals the open segment and marks the set complete at `next_row` rows. Raises SetCorrupt.

        A set that was complete already ends at the same row again.
        """
        self.seal()
        self.settle()
        if self._manifest.total_rows not in (None, self.next_row):
            told = self._manifest.total_rows
            raise SetCorrupt(
                f"the rows of {self._folder} end at {self.next_row}, and its manifest says {told}; delete the set to "
                "recompute it"
            )
        summary = self._statistics.summary(self._index)
        # Read anew under the lock: another process may have added columns to the manifest.
        Manifest.update(
            self._folder,
            lambda manifest: replace(manifest, total_rows=self.next_row, statistics={**manifest.statistics, **summary}),
        )

    def close(self) -> None:
        """Waits for the sealing under way and gives up the open segment. Raises the error of a failed sealing."""
        try:
            self.settle()
        finally:
            self._sealer.shutdown()
            self._statistics.close()
            for segment in self._open:
                segment.discard()
            self._open = ()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _capacity(self) -> int:
        """Rows that the open segment can hold: as many as it has in other columns, else those of a full segment."""
        return self._index.records[self._open_segment].n_rows if self._is_known else self._manifest.segment_rows

    @property
    def _is_known(self) -> bool:
        """True when the open segment exists in other columns."""
        return self._open_segment < len(self._index.records)

    def _begin_segment(self) -> None:
        """Opens the next segment while the one before may still be sealed in the background."""
        # A short one must be recorded first: readers take every segment without a record to be full.
        if self._open_rows < self._capacity or (self._sealing and self._sealing.done()):
            self.settle()
        self._open_segment = self._next_segment
        self._open_first_row, self._open_rows = self.next_row, 0
        self._non_finite = Counter()
        opened: list[OpenSegment] = []
        with self._disk, ExitStack() as undo:
            for column in self._columns:
                segment = OpenSegment(
                    self._folder,
                    column,
                    segment=self._open_segment,
                    first_row=self._open_first_row,
                    capacity_rows=self._capacity,
                    spare_bytes=SPARE_BYTES + self._statistics.spare_bytes(column),
                )
                undo.callback(segment.discard)
                opened.append(segment)
            undo.pop_all()
        self._open = tuple(opened)

    def _seal_files(self, segments: Sequence[OpenSegment], record: SegmentRecord) -> SegmentIndex:
        with ExitStack() as files:
            for segment in segments:
                files.callback(segment.close)
            parts = self._statistics.start(segments, record.n_rows)
            digests = {segment.column.name: segment.digest(record.n_rows) for segment in segments}
            for segment in segments:
                segment.flush()  # Outside the lock, for which the next segment may be waiting.
            wait(parts.values())
            with self._disk:
                for segment in segments:
                    segment.seal(record.n_rows)
                    fsync_folder(column_folder(self._folder, segment.column))
                self._statistics.save(record.segment, parts, self._index)
                index = self._index.append(self._folder, replace(record, digests=digests))
                self._statistics.recorded(record.segment)
        return index
