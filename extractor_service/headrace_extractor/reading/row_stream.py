"""Rows of an extraction for one reader: committed rows at once, the others as they are committed.

A run of rows is read when the run before it is on its way, so a slow reader costs no more than its cursor and one run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from headrace_chassis.shutdown import Shutdown
from headrace_extractor.errors import DigestMismatch, FieldInvalid, HookpointNotFound, RowsExpired, RowTooLarge
from headrace_extractor.extractions.job import ExtractionJob, rows_expired
from headrace_extractor.extractions.readers import Reader
from headrace_extractor.extractions.values import ExtractionState
from headrace_extractor.reading.reading_order import OrderRequest, way_of
from headrace_extractor.sets.log_errors import log_errors_as_typed, too_many_streams
from headrace_log import errors as log_errors
from headrace_log.index import SegmentRecord
from headrace_log.reader import KEPT_SEGMENTS, RowRun, SetReader

DEFAULT_CHUNK_BYTES = 1024 * 1024
# A range of mapped rows costs the same however many rows it has, and ends with its segment or block anyway. Ranges of a
# window are smaller: its forward pass waits until a range is released.
DEFAULT_RANGE_BYTES = 64 * 1024 * 1024
WINDOW_RANGE_BYTES = 16 * 1024 * 1024
MAX_CHUNK_BYTES = 3_500_000
MAX_LARGE_CHUNK_BYTES = 16 * 1024 * 1024
# The largest message of a server: a chunk and its frame. And gRPC's default limit in a client.
MAX_MESSAGE_BYTES = 17 * 1024 * 1024
MAX_SMALL_MESSAGE_BYTES = 4 * 1024 * 1024
# Alignment and offset of a column, and the head of a message; a bound, not the exact size.
_COLUMN_FRAME_BYTES, _FRAME_BYTES = 80, 1024
HEARTBEAT_S = 15.0
# A reader that has all committed rows is told so after this time: it then knows that it waits for the extractor.
CAUGHT_UP_S = 0.02

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """The rows that a reader wants, and how it wants them; checked when made."""

    start_row: int = 0
    end_row: int = 0  # 0: all rows that there will be
    columns: tuple[str, ...] = ()
    chunk_bytes: int = 0
    allow_large_chunks: bool = False
    reader: str = ""
    explicit_release: bool = False
    mapped: bool = False
    order: OrderRequest = field(default_factory=OrderRequest)

    def __post_init__(self) -> None:
        limit = MAX_LARGE_CHUNK_BYTES if self.allow_large_chunks else MAX_CHUNK_BYTES
        if not 0 <= self.chunk_bytes <= limit:
            more = "" if self.allow_large_chunks else " (up to 16 MiB with allow_large_chunks)"
            raise FieldInvalid(
                f"chunk_bytes is {self.chunk_bytes}; it must be from 0 (1 MiB) to {limit}{more}.", field="chunk_bytes"
            )
        if self.start_row < 0:
            raise FieldInvalid("start_row is negative.", field="start_row")
        if self.end_row < 0 or 0 < self.end_row < self.start_row:
            raise FieldInvalid("end_row lies before start_row; 0 means all rows.", field="end_row")
        if len(self.reader) > 255:
            raise FieldInvalid("reader has more than 255 characters.", field="reader")
        if len(set(self.columns)) != len(self.columns):
            raise FieldInvalid("columns names one column twice.", field="columns")


@dataclass(frozen=True, slots=True)
class Pause:
    """No rows were sent for a while: `n_rows` are committed, and the extraction is in `state`."""

    n_rows: int
    state: ExtractionState


@dataclass(frozen=True, slots=True)
class End:
    """Every row that was asked for was sent."""

    next_row: int
    n_rows: int


class RowStream:
    """A reader of an extraction, attached to it until `close`.

    `nonce` is the word by which the client tells that it sees the set's folder; empty: rows are sent inline.
    """

    def __init__(self, job: ExtractionJob, request: StreamRequest, shutdown: Shutdown | None = None) -> None:
        self._job = job
        self._shutdown = shutdown or Shutdown()  # One that never begins.
        self._request = request
        self._way = way_of(job, request.order)
        if request.mapped and job.set.is_window and not request.explicit_release:
            raise FieldInvalid(
                "A WINDOW set lets rows go when they are sent, before a client has mapped them; ask for "
                "explicit_release, or for TRANSPORT_INLINE.",
                field="explicit_release",
            )
        columns = check_columns(request.columns, job.columns)
        self._attached: Reader = job.attach(
            request.reader, self._way.first_row_needed(request.start_row), shard=request.order.shard
        )
        try:
            self._set_reader = self._open(columns)
            self.nonce = self._nonce() if request.mapped else ""
            # Wide rows of a mapped stream come as ranges, once they are sealed.
            self._inline = self._fits_message(columns)
        except BaseException:
            job.detach(self._attached)
            raise
        self._generation = self._job_generation
        self._checked = range(0)  # Rows of the segment whose bytes were compared with their digests.
        self.next_row = request.start_row
        self._over = False
        row_bytes = self._set_reader.row_bytes
        self._chunk_rows = max(1, (request.chunk_bytes or DEFAULT_CHUNK_BYTES) // row_bytes)
        if self._way.block_rows > self._chunk_rows and not request.chunk_bytes:
            # Blocks are cut evenly, into chunks of less than twice the usual size: a short chunk costs as much as any.
            self._chunk_rows = math.ceil(self._way.block_rows / (self._way.block_rows // self._chunk_rows))
        range_bytes = WINDOW_RANGE_BYTES if job.set.is_window else DEFAULT_RANGE_BYTES
        self._range_rows = max(1, (request.chunk_bytes or range_bytes) // row_bytes)

    @property
    def name(self) -> str:
        """Name of this reader."""
        return self._attached.name

    @property
    def set_reader(self) -> SetReader:
        """The reader of the set's files, with the columns that are read."""
        return self._set_reader

    @property
    def block_rows(self) -> int:
        """Rows in a block of the reading order; 0 if the order is that of the rows."""
        return self._way.block_rows

    @property
    def end_row(self) -> int:
        """One past the last place that will be sent; 0 while unknown."""
        known, wanted = self._way.end, self._request.end_row
        return min(known, wanted) if known and wanted else known or wanted

    async def events(self) -> AsyncGenerator[RowRun | Pause | End, None]:
        """Yields runs of rows in reading order without gaps, pauses, and an end; use a run before asking for the next.

        While a run is in use, `next_row` is its place in the order. A run without columns is a range of sealed rows for
        a client that maps them; rows that are not sealed come with their columns in either transport. Raises the
        extraction's error if it ends before the rows wanted exist, and ShuttingDown. Committed rows are yielded without
        a task or a turn of the event loop: at a thousand chunks a second, these would be most of a chunk's cost.
        """
        quiet_until, told = time.monotonic() + CAUGHT_UP_S, self._job.value.state
        while not self._at_end():
            self._shutdown.check()
            if self.next_row < self._way.n_there and (run := await self._next_run()):
                yield run
                self.next_row += run.n_rows
                if not self._request.explicit_release:
                    self._job.release(self._attached.name, self._way.first_row_needed(self.next_row))
                quiet_until = time.monotonic() + CAUGHT_UP_S
            elif self._job.value.state in (ExtractionState.FAILED, ExtractionState.CANCELLED):
                raise self._job.failure_error()
            elif time.monotonic() >= quiet_until or self._job.value.state is not told:
                told = self._job.value.state
                yield Pause(self._job.value.n_rows, told)
                quiet_until = time.monotonic() + HEARTBEAT_S  # However often the extraction changes without a new row.
            else:
                await self._shutdown.race(self._job.changed(quiet_until - time.monotonic()))
        self._over = True
        yield End(self.next_row, self._job.value.n_rows)

    def close(self) -> None:
        """Detaches the reader."""
        self._set_reader.close()
        if self._over:  # The reader may release the last rows that it was sent, or come back for them.
            explicit = self._request.explicit_release
            last_row = min(self._way.first_row_needed(self.next_row), self._job.value.n_rows) if explicit else 0
            self._attached.last_row = min(self._attached.last_row, last_row)
        self._job.detach(self._attached)

    def _nonce(self) -> str:
        try:
            return self._job.set.nonce()
        except (OSError, log_errors.DiskFull) as exc:
            logger.warning("no nonce for %s, so its rows are sent inline: %s", self._job.folder, exc)
            return ""

    def _fits_message(self, columns: Sequence[str]) -> bool:
        """True if a row fits into a message. Raises RowTooLarge if it does not, and rows are sent in messages alone."""
        large = self._request.allow_large_chunks
        limit = MAX_MESSAGE_BYTES if large else MAX_SMALL_MESSAGE_BYTES
        row_bytes = self._set_reader.row_bytes
        size = row_bytes + _COLUMN_FRAME_BYTES * len(columns) + _FRAME_BYTES
        if size <= limit or self.nonce:
            return size <= limit
        more = "" if large or size > MAX_MESSAGE_BYTES else "set allow_large_chunks and accept such messages, "
        raise RowTooLarge(
            f"One row of these {len(columns)} columns has {row_bytes} bytes, and a message at most {limit}: {more}"
            "read fewer columns at a time, or map the rows on the node itself (TRANSPORT_MAPPED).",
            metadata={"row_bytes": str(row_bytes), "limit_bytes": str(limit)},
        )

    def _open(self, columns: Sequence[str]) -> SetReader:
        try:
            returns = self._way.block_rows and not self._job.set.is_window  # To segments that it has read before.
            with log_errors_as_typed():
                return SetReader(self._job.folder, columns, keep_segments=KEPT_SEGMENTS if returns else 1)
        except FileNotFoundError as exc:
            value = self._job.value
            if value.state in (ExtractionState.FAILED, ExtractionState.CANCELLED):
                raise self._job.failure_error() from exc
            raise rows_expired(self._request.start_row, first_row=value.n_rows, n_rows=value.n_rows) from exc

    def _at_end(self) -> bool:
        end_row, value = self.end_row, self._job.value
        if self._request.start_row > end_row > 0 and value.state == ExtractionState.DONE:
            raise RowsExpired(
                f"There is no row {self._request.start_row}: the last one is {end_row - 1}.",
                metadata={"first_available_row": "0", "n_rows": str(value.n_rows)},
            )
        return bool(end_row) and self.next_row >= end_row

    async def _next_run(self) -> RowRun | None:
        """The next rows, of files that are as they were sealed; None if there are none yet after all.

        Raises DigestMismatch, which names the damaged rows.
        """
        if unchecked := self._unchecked():
            await self._shutdown.race(self._check(unchecked))
        looked_again = False
        while True:
            try:
                return self._read()
            except log_errors.SetCorrupt as exc:
                row, _ = self._way.stretch(self.next_row)
                if row >= self._set_reader.sealed_rows and not self._job.value.state.ended:
                    return None  # The job was not told yet.
                changed = self._set_reader.sealed_segment(row)
                if changed is None or looked_again:
                    raise DigestMismatch(f"{exc}.", resource=("ActivationSet", self._job.value.set_id)) from exc
            # Files that are whole now are read once more, and a segment that a WINDOW set has dropped is told as such.
            await self._shutdown.race(self._check(changed))
            looked_again = True

    @property
    def _job_generation(self) -> tuple[int, int]:
        """Changes whenever rows may lie in other files than before: a writer died, or damage was mended."""
        return self._job.generation, self._job.set.integrity.n_mended

    def _unchecked(self) -> SegmentRecord | None:
        """The sealed segment that is read next, unless its files are known to be as they were sealed."""
        row, _ = self._way.stretch(self.next_row)
        if row in self._checked and self._generation == self._job_generation:
            return None
        reader = self._set_reader
        with log_errors_as_typed():
            if self._generation != self._job_generation:
                reader.forget_files()
                self._generation = self._job_generation
            elif row >= reader.sealed_rows:  # Else a segment sealed since would be read as one being written.
                reader.refresh()
        record = reader.sealed_segment(row)
        if record is None or row < reader.first_row:
            return None  # Of the segment being written, or dropped.
        self._job.set.index()  # Segments sealed since the last look count as compared.
        try:
            known = self._job.set.integrity.knows(record, reader.columns, reader.stamps(record.segment))
        except OSError:
            known = False
        if known:
            self._checked = range(record.first_row, record.end_row)
        return None if known else record

    async def _check(self, record: SegmentRecord) -> None:
        """Compares a segment with its digests, in a thread. Raises DigestMismatch, which names its damaged rows."""
        await self._job.set.check_segment(record, self._set_reader.columns)
        with log_errors_as_typed():
            self._set_reader.forget_files()  # Open ones may be other files than those that were compared.
        self._checked = range(record.first_row, record.end_row)

    def _read(self) -> RowRun | None:
        """The next rows; None if they are not sealed and too wide for a message."""
        n_rows, end = self._job.value.n_rows, self.end_row
        row, together = self._way.stretch(self.next_row)
        end_row = min(n_rows, row + together, row + end - self.next_row) if end else min(n_rows, row + together)
        try:
            if self.nonce and (n_sealed := self._set_reader.sealed_after(row)):
                return RowRun(row, min(n_sealed, self._range_rows, end_row - row), ())
            if not self._inline:
                return None
            return self._set_reader.read(row, self._chunk_rows, end_row=end_row)
        except log_errors.RowsExpired as exc:
            raise rows_expired(exc.row, first_row=exc.first_available_row, n_rows=n_rows) from exc
        except log_errors.TooManyFiles as exc:
            raise too_many_streams(exc) from exc


def check_columns(wanted: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns to read, in the order asked for, or all `columns`. Raises HookpointNotFound."""
    for name in wanted:
        if name not in columns:
            raise HookpointNotFound(
                f"Column {name!r} is not in this extraction; it has {', '.join(columns)}.",
                metadata={"nearest": ", ".join(columns[:10])},
                resource=("Column", name),
            )
    return tuple(wanted) or tuple(columns)
