"""One extraction as others see it: its state, its readers, its end.

The rows come from the passes over its set (`set_passes.py`), which it may share with other extractions of that set.
Here is what is its own: how far its columns are, who reads them, and in a WINDOW set what goes behind its readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora.counting import RowCount
from headrace_extractor.errors import (
    CorpusEmpty,
    ExtractionCancelled,
    Failure,
    ReaderStalled,
    RowsExpired,
    SetNotFound,
    error_for,
    reason_of,
)
from headrace_extractor.extractions.drive import SetPasses
from headrace_extractor.extractions.passes import Want
from headrace_extractor.extractions.readers import FOR_GOOD, Reader, Readers, shard_key
from headrace_extractor.extractions.values import Extraction, ExtractionState
from headrace_extractor.extractions.window import SEAL_POLL_S, Window
from headrace_extractor.meters import RateMeter, Transfer
from headrace_extractor.sets.ports import Room
from headrace_extractor.sets.receipt import read_receipt
from headrace_extractor.sets.spec import ExtractionSpec
from headrace_log import retention
from headrace_log.index import SegmentIndex, dropped_rows
from headrace_log.manifest import Manifest
from headrace_log.order import Shard

# A count that takes longer goes on beside the first pass, which ends if the rows turn out not to fit.
COUNT_WAIT_S = 2.0
_ALL = Shard()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext:
    """What every job needs."""

    room: Room
    save: Callable[[ExtractionJob], None]
    let_go: Callable[[], None]
    count_rows: Callable[[ExtractionSpec], Awaitable[RowCount]]


class ExtractionJob:
    """Runs one extraction; `value` is always its present state."""

    def __init__(self, value: Extraction, context: JobContext, passes: SetPasses) -> None:
        self.value = replace(value, receipt=read_receipt(Path(value.path), value.spec.columns))
        # Restarts must not make `seq` smaller: it starts at the clock.
        self.seq = int(time.time() * 1000)
        self.generation = 0
        self.folder = Path(value.path)
        self.request_ids: set[str] = set()
        self.stop: ServiceError | None = None
        self._recovered = value.state is ExtractionState.RECOVERING
        self.task: asyncio.Task[None] | None = None
        self._context = context
        self._passes = passes
        self._changed = asyncio.Event()
        self._readers = Readers()
        self._helpers: set[asyncio.Task[None]] = set()
        self._rate = RateMeter()
        self._row_bytes = 0
        self._is_window = value.spec.retention.is_window
        self._window = self._open_window() if self._is_window and self.folder.exists() else None

    # -- for everyone -------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of this extraction: provenance, then its hookpoints, and behind an 8-bit one its scales."""
        return self.value.spec.columns

    @property
    def want(self) -> Want:
        """What it asks of its set."""
        return Want(columns=self.columns, max_rows=self.value.spec.max_rows)

    @property
    def end_row(self) -> int:
        """One past the last row this extraction will have; 0 while unknown."""
        return self.value.n_rows if self.value.state == ExtractionState.DONE else self.value.spec.max_rows

    @property
    def grant_row(self) -> int | None:
        """The row its pass may write up to; None: no limit."""
        return self._window.grant_row if self._window else None

    @property
    def holds_set(self) -> bool:
        """True while its set must stay: it is written, read, or a window in its grace."""
        return not self.value.state.ended or bool(self._readers) or self._is_window

    def changed(self, timeout_s: float) -> Coroutine[Any, Any, bool]:
        """Waits for the next change after this call; False if there was none in time.

        No `async def`: a change between the call and the first step of the coroutine must count.
        """
        return _is_set(self._changed, timeout_s)

    def update(self, **changes: Any) -> None:
        """Changes the value and wakes everyone who waits for that."""
        state_before = self.value.state
        self.value = replace(self.value, update_time=time.time(), **changes)
        self.seq += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self.value.state != state_before:
            logger.info("extraction %s is %s", self.value.id, self.value.state)
            if self.value.state.ended:  # What has not is recovered from its set, wherever it was.
                self._context.save(self)

    def failure_error(self) -> ServiceError:
        """What to tell a reader of an extraction that ended without the rows it wants."""
        if self.stop:
            return self.stop
        failure = self.value.failure or Failure(reason="INTERNAL", message="The extraction ended without a reason.")
        return failed_as(failure, self.value)

    # -- running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Brings the extraction to its end."""
        try:
            await self._run()
        except asyncio.CancelledError:
            if self.stop is None:
                raise  # The server goes away; the job goes on when it is back.
            self._end_badly(self.stop)
        except ServiceError as exc:
            self._end_badly(exc)
        except Exception:
            logger.exception("extraction %s hit a bug", self.value.id)
            message = f"Extraction {self.value.id} hit a bug; the node's log has the details."
            self.update(state=ExtractionState.FAILED, failure=Failure(reason="INTERNAL", message=message))
        self.end_unread()

    def end_unread(self) -> None:
        """Frees a WINDOW set after its grace unless somebody reads it."""
        if self._window:
            self._start_grace()

    async def cancel(self) -> None:
        """Ends the extraction; rows so far stay."""
        await self._end_early(
            ExtractionCancelled(f"Extraction {self.value.id} was cancelled; start it again to go on.")
        )

    async def close(self) -> None:
        """Ends the job's tasks without ending the extraction: the server goes away."""
        tasks = [task for task in (self.task, *self._helpers) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._window:
            await self._window.close()

    async def _run(self) -> None:
        if self._passes.settled(self):
            return
        counting = asyncio.create_task(self._count_and_reserve(), name=f"count-{self.value.id}")
        try:
            if not await self._surely_fits():
                await asyncio.wait([counting], timeout=COUNT_WAIT_S)
            if counting.done():
                counting.result()
            await self._passes.complete(self)
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
            self._context.room.release(self.value.id)

    async def _surely_fits(self) -> bool:
        """True if there is room for all rows it could have: then its pass need not wait until they are counted."""
        n_rows = self.value.spec.max_rows
        return n_rows > 0 and await self._context.room.fits(self.folder, columns=self.columns, n_rows=n_rows)

    async def _count_and_reserve(self) -> None:
        """Finds out how many rows there will be, and reserves room for them. Raises DiskFull where they never fit."""
        spec = self.value.spec
        try:
            count = await self._context.count_rows(spec)
        except ServiceError as exc:
            logger.info("rows of extraction %s can't be counted: %s", self.value.id, exc)
            return
        expected = min(count.n_rows, spec.max_rows) if spec.max_rows else count.n_rows
        if not self.value.state.ended:
            self.update(n_rows_expected=expected, n_rows_exact=count.exact)
        await self._reserve(expected)

    async def _reserve(self, n_rows: int) -> None:
        try:
            window_bytes = self.value.spec.retention.window_bytes if self._is_window else 0
            await self._context.room.reserve(
                self.value.id, self.folder, columns=self.columns, n_rows=n_rows, window_bytes=window_bytes
            )
        except ServiceError as exc:
            await self._end_early(exc)
            raise

    async def _end_early(self, why: ServiceError) -> None:
        if self.value.state.ended or self.stop:
            return
        self.stop = why
        if not await self._passes.stop(self) and self.task and self.task is not asyncio.current_task():
            self.task.add_done_callback(lambda _: self._end_unbegun(why))
            self.task.cancel()

    def _end_unbegun(self, why: ServiceError) -> None:
        """A task that is cancelled before its first step has said nothing."""
        if not self.value.state.ended:
            self._end_badly(why)
            self.end_unread()

    def _end_badly(self, exc: ServiceError) -> None:
        state = ExtractionState.CANCELLED if isinstance(exc, ExtractionCancelled) else ExtractionState.FAILED
        failure = Failure(reason=reason_of(exc), message=exc.message, metadata=exc.metadata)
        n_rows = self._sealed_rows()
        self.generation += 1
        self.update(state=state, failure=failure, n_rows=n_rows, rows_per_s=0.0, waiting_for=(), queue_position=0)

    # -- what the passes over its set tell ----------------------------------------------------------------------------

    def on_waiting(self, event: Transfer | int) -> None:
        """The model loads, or so many are before it."""
        if isinstance(event, Transfer):
            self.update(state=ExtractionState.LOADING, transfer=event, queue_position=0)
        elif (self.value.state, self.value.queue_position) != (ExtractionState.QUEUED, event):
            self.update(state=ExtractionState.QUEUED, queue_position=event, transfer=None)

    def on_begin(self) -> None:
        """A pass over its columns begins."""
        self._rate.clear()
        self.update(state=ExtractionState.RUNNING, waiting_for=(), queue_position=0, transfer=None)

    def on_committed(self, n_rows: int, n_non_finite: int) -> None:
        """Rows before `n_rows` are readable in all its columns."""
        value, n_rows = self.value, self._wanted_of(n_rows)
        self.update(
            state=ExtractionState.RUNNING,
            waiting_for=(),
            queue_position=0,
            n_rows=n_rows,
            n_rows_computed=value.n_rows_computed + max(n_rows - value.n_rows, 0),
            rows_per_s=self._rate.at(n_rows, time.monotonic()),
            size_bytes=self._size_bytes(n_rows),
            n_non_finite=n_non_finite,
        )

    def on_blocked(self) -> None:
        """The window is full: says who is waited for, and grants at once what was released meanwhile."""
        self._rate.clear()
        self.update(state=ExtractionState.WAITING, waiting_for=self._readers.slowest(), rows_per_s=0.0)
        self._start_grace()
        self._spawn(self._unblock())

    def on_lost(self) -> None:
        """Goes back to what is sealed: the rest will be written anew, in new files."""
        self.generation += 1
        self.update(state=ExtractionState.RECOVERING, n_rows=self._sealed_rows(), rows_per_s=0.0)

    def on_found(self, n_rows: int) -> None:
        """Rows before `n_rows` are there without its doing, and more will come."""
        if self._wanted_of(n_rows) > self.value.n_rows:
            self.update(n_rows=self._wanted_of(n_rows))

    def on_all_rows(self, n_rows: int, n_non_finite: int) -> None:
        """Every row is there. Raises CorpusEmpty if that is none."""
        if n_rows == 0:
            raise CorpusEmpty("No row survives the recipe: the documents are empty or the recipe drops every token.")
        self.update(
            state=ExtractionState.DONE,
            n_rows=n_rows,
            n_rows_expected=n_rows,
            n_rows_exact=True,
            n_non_finite=n_non_finite,
            cached=self.value.n_rows_computed == 0 and not self._recovered,
            waiting_for=(),
            queue_position=0,
            size_bytes=self._size_bytes(n_rows),
            receipt=read_receipt(self.folder, self.columns),
        )

    def _sealed_rows(self) -> int:
        return self._wanted_of(SegmentIndex.load(self.folder).n_rows(self.columns))

    def _wanted_of(self, n_rows: int) -> int:
        """Of rows that there are, those that it asked for: others may want more of the set."""
        return min(n_rows, self.value.spec.max_rows) if self.value.spec.max_rows else n_rows

    def _size_bytes(self, n_rows: int) -> int:
        """Bytes kept of this extraction's own columns; the set may have others."""
        if not self._row_bytes:
            manifest = Manifest.load(self.folder)
            self._row_bytes = sum(manifest.column(name).row_bytes for name in self.columns)
        return (n_rows - (self._window.first_kept_row if self._window else 0)) * self._row_bytes

    # -- readers ------------------------------------------------------------------------------------------------------

    def attach(self, name: str, start_row: int, *, shard: Shard = _ALL) -> Reader:
        """Attaches a reader; raises RowsExpired if its first row is gone, SetNotFound if the set is.

        With the first shard of several all are waited for: the others' first rows must not go.
        """
        self._check_rows(start_row)
        reader = self._readers.attach(name, start_row, shard=shard_key(shard) if shard.count > 1 else "")
        if self._window and shard.count > 1:
            self._readers.expect(shard.count, self._window.first_kept_row, until=self._grace_end())
        if self._window:
            self._window.end_grace()
        self._context.room.used(self.folder)
        self.update(readers=self._readers.statuses())
        return reader

    def release(self, name: str, row: int) -> None:
        """Lets rows before `row` go for the reader called `name`; FOR_GOOD: it comes no more.

        In a WINDOW set this makes room for the forward pass.
        """
        if row != FOR_GOOD:
            row = min(row, self.value.n_rows)
        self._readers.release(name, row, until=self._grace_end())
        if self._window and self._make_room(self._window):
            self._spawn(self._passes.grant(self._window.grant_row))

    def detach(self, reader: Reader) -> None:
        """Detaches a reader. The last one of a WINDOW set leaves it to itself after its grace.

        While others read, they wait for one that is not done, as long as that.
        """
        self._readers.detach(reader, back_until=self._grace_end() if self._window else 0.0)
        self._context.room.used(self.folder)
        self.update(readers=self._readers.statuses())
        self._context.let_go()
        done = self.value.state == ExtractionState.DONE
        read_out = done and reader.released_row >= self.value.n_rows and self._readers.all_back()
        self._start_grace(read_out=read_out)

    def _check_rows(self, start_row: int) -> None:
        if self._is_window:
            first_row = dropped_rows(self.folder) if self.folder.exists() else self.value.n_rows
            if start_row < first_row:
                raise rows_expired(start_row, first_row=first_row, n_rows=self.value.n_rows)
        elif self.value.state.ended and SegmentIndex.load(self.folder).n_rows(self.columns) < self.value.n_rows:
            raise SetNotFound(
                f"The rows of extraction {self.value.id} were evicted or deleted; call StartExtraction with the same "
                "spec, which computes them again.",
                metadata={"set_id": self.value.set_id},
                resource=("ActivationSet", self.value.set_id),
            )

    # -- the window ---------------------------------------------------------------------------------------------------

    def _open_window(self) -> Window:
        return Window(self.folder, window_bytes=self.value.spec.retention.window_bytes, on_abandoned=self._on_abandoned)

    def _make_room(self, window: Window) -> bool:
        return window.make_room(self._readers.released_row(window.first_kept_row))

    async def _unblock(self) -> None:
        """Grants rows as soon as there is room: a released segment can only be dropped once it is sealed."""
        while self._window and self.value.state == ExtractionState.WAITING:
            if self._make_room(self._window) or self._window.grant_row > self.value.n_rows:
                await self._passes.grant(self._window.grant_row)
                return
            await asyncio.sleep(SEAL_POLL_S)

    def _grace_end(self) -> float:
        return time.monotonic() + self.value.spec.retention.reader_grace_s

    def _start_grace(self, *, read_out: bool = False) -> None:
        if self._window and not self._readers:
            self._window.start_grace(0.0 if read_out else self.value.spec.retention.reader_grace_s)

    async def _on_abandoned(self, grace_s: float) -> None:
        """Frees everything a WINDOW set holds when nobody has read it for its grace."""
        await self._end_early(
            ReaderStalled(
                f"Nobody has read extraction {self.value.id} for {grace_s:.0f} s; its window was freed. Start it again "
                "with a reader attached, or with RETAIN."
            )
        )
        if self.task:
            await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(retention.delete_set, self.folder)
        self.update(size_bytes=0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)


async def _is_set(event: asyncio.Event, timeout_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
            return True
    return False


def rows_expired(row: int, *, first_row: int, n_rows: int) -> RowsExpired:
    """The error for rows that are no longer, or will never be."""
    metadata = {"first_available_row": str(first_row), "n_rows": str(n_rows)}
    return RowsExpired(f"Row {row} is gone; the first one still there is {first_row}.", metadata=metadata)


def failed_as(failure: Failure, value: Extraction) -> ServiceError:
    """The error that repeats an extraction's failure to a reader."""
    resource = ("Extraction", value.id)
    return error_for(failure.reason, failure.message, metadata=failure.metadata, resource=resource)
