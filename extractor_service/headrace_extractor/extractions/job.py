"""One extraction as clients see it: its state, its readers, its end.

The rows come from the passes over its set (`drive.py`), which it may share with other extractions of that set. A job
knows how many rows its own columns have, which readers read them, and which rows of a WINDOW set may be dropped behind
these readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace_chassis.errors import ServiceError
from headrace_chassis.meters import Meter
from headrace_extractor.errors import (
    CorpusEmpty,
    ExtractionCancelled,
    Failure,
    ModelUnsupported,
    ReaderStalled,
    RowsExpired,
    SetNotFound,
    error_for,
    reason_of,
)
from headrace_extractor.extractions.drive import SetPasses
from headrace_extractor.extractions.passes import Want
from headrace_extractor.extractions.ports import QueuePosition
from headrace_extractor.extractions.readers import FOR_GOOD, Reader, Readers, shard_key
from headrace_extractor.extractions.services import Services
from headrace_extractor.extractions.values import Extraction, ExtractionState
from headrace_extractor.extractions.window import SEAL_POLL_S, Window
from headrace_extractor.meters import Transfer
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_extractor.sets.keeper import Reservation
from headrace_log.order import Shard

# A count that takes longer goes on beside the first pass, which is ended if the rows turn out not to fit.
COUNT_WAIT_S = 2.0
_ALL = Shard()

logger = logging.getLogger(__name__)


class ExtractionJob:
    """Runs one extraction; `value` is always its present state.

    `end_reason` is set once the extraction is to end before it has its rows. `generation` counts how often rows that
    were not sealed were lost: a reader then maps the open segment anew.
    """

    def __init__(
        self,
        value: Extraction,
        services: Services,
        *,
        of: ActivationSet,
        passes: SetPasses,
        request_ids: Iterable[str] = (),
    ) -> None:
        self.value = replace(value, receipt=of.receipt(value.spec.columns))
        # The clock, since `seq` must not become smaller by a restart.
        self.seq = int(time.time() * 1000)
        self.generation = 0
        self.set = of
        self.passes = passes
        self.request_ids = set(request_ids)
        self.end_reason: ServiceError | None = None
        self.task: asyncio.Task[None] | None = None
        self.reported_seq = 0  # `seq` when its set was last reported to the registry.
        self._recovered = value.state is ExtractionState.RECOVERING
        self._services = services
        self._changed = asyncio.Event()
        self._readers = Readers()
        self._helpers: set[asyncio.Task[None]] = set()
        self._rate = Meter()
        self._row_bytes = 0
        self._window: Window | None = None
        if of.is_window and of.exists:
            window_bytes = value.spec.retention.window_bytes
            self._window = Window(of, window_bytes=window_bytes, on_abandoned=self._on_abandoned)
        of.users.append(self)

    # -- for everyone -------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The folder of its set."""
        return self.set.folder

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns: provenance, then its hookpoints, each 8-bit one followed by its scales."""
        return self.value.spec.columns

    @property
    def want(self) -> Want:
        """The rows and columns that it wants of its set."""
        return Want(columns=self.columns, max_rows=self.value.spec.max_rows)

    @property
    def allows_non_finite(self) -> bool:
        """True if its rows may have values that are NaN or infinite."""
        return self.value.spec.allow_non_finite

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
        return not self.value.state.ended or bool(self._readers) or (self.set.is_window and self.set.exists)

    @property
    def holds_set_itself(self) -> bool:
        """True while its set must stay, and not only for its readers."""
        return self.holds_set and not (self.value.state.ended and self._readers)

    @property
    def reader_names(self) -> Sequence[str]:
        """Names of the attached readers."""
        return [status.reader for status in self.value.readers]

    @property
    def id(self) -> str:
        """Id of the extraction."""
        return self.value.id

    def changed(self, timeout_s: float) -> Coroutine[Any, Any, bool]:
        """Waits for the next change after this call; False if there was none in time.

        No `async def`: a change between the call and the first step of the coroutine must count.
        """
        changed = self._changed

        async def wait() -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await changed.wait()
                    return True
            return False

        return wait()

    def update(self, **changes: Any) -> None:
        """Changes the value and wakes all that wait for a change."""
        state_before = self.value.state
        self.value = replace(self.value, update_time=time.time(), **changes)
        self.seq += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self.value.state != state_before:
            logger.info("extraction %s is %s", self.value.id, self.value.state)
            if self.value.state.ended:  # One that has not ended is recovered from its set, whatever its last state.
                self._services.records.save_change(self.value, self.request_ids)
                self._services.holder_left.set()

    def failure_error(self) -> ServiceError:
        """The error for a reader of an extraction that ended without the rows it wants."""
        if self.end_reason:
            return self.end_reason
        failure = self.value.failure or Failure(reason="INTERNAL", message="The extraction ended without a reason.")
        return error_for(
            failure.reason, failure.message, metadata=failure.metadata, resource=("Extraction", self.value.id)
        )

    # -- running ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the task that brings the extraction to its end."""
        self.task = asyncio.create_task(self._run(), name=f"extraction-{self.value.id}")

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
        try:
            await self._get_all_rows()
        except asyncio.CancelledError:
            if self.end_reason is None:
                raise  # The server goes away; the job goes on when it is back.
            self._end_badly(self.end_reason)
        except ServiceError as exc:
            self._end_badly(exc)
        except Exception:
            logger.exception("extraction %s hit a bug", self.value.id)
            message = f"Extraction {self.value.id} hit a bug; the node's log has the details."
            self.update(state=ExtractionState.FAILED, failure=Failure(reason="INTERNAL", message=message))
        self.start_grace()

    async def _get_all_rows(self) -> None:
        await self.set.look_for_damage(self.columns, self.value.spec.max_rows)
        if self.passes.tell_rows(self):
            return
        counting = asyncio.create_task(self._count_and_reserve(), name=f"count-{self.value.id}")
        try:
            max_rows = self.value.spec.max_rows
            surely_fits = max_rows > 0 and await self._services.keeper.fits(self._reservation(max_rows, window_bytes=0))
            if not surely_fits:  # Else the pass need not wait until the rows are counted.
                await asyncio.wait([counting], timeout=COUNT_WAIT_S)
            if counting.done():
                counting.result()
            await self.passes.complete(self)
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)
            self._services.keeper.release(self.value.id)

    async def _count_and_reserve(self) -> None:
        """Counts the rows there will be, and reserves space for them. Raises DiskFull if there is none for them."""
        spec = self.value.spec
        try:
            count = await self._services.counter.count(spec)
        except ModelUnsupported as exc:  # The runner would fail as well, or take for ever.
            await self._end_early(exc)
            raise
        except ServiceError as exc:
            logger.info("rows of extraction %s can't be counted: %s", self.value.id, exc)
            return
        expected = min(count.n_rows, spec.max_rows) if spec.max_rows else count.n_rows
        if not self.value.state.ended:
            self.update(n_rows_expected=expected, n_rows_exact=count.exact)
        window_bytes = spec.retention.window_bytes if self.set.is_window else 0
        try:
            await self._services.keeper.reserve(self.value.id, self._reservation(expected, window_bytes=window_bytes))
        except ServiceError as exc:
            await self._end_early(exc)
            raise

    def _reservation(self, n_rows: int, *, window_bytes: int) -> Reservation:
        return Reservation(set=self.set, columns=self.columns, n_rows=n_rows, window_bytes=window_bytes)

    async def _end_early(self, why: ServiceError) -> None:
        if self.value.state.ended or self.end_reason:
            return
        self.end_reason = why
        if not await self.passes.leave(self) and self.task and self.task is not asyncio.current_task():

            def end_unbegun(_: asyncio.Task[None]) -> None:
                """Ends the extraction if its task was cancelled before its first step."""
                if not self.value.state.ended:
                    self._end_badly(why)
                    self.start_grace()

            self.task.add_done_callback(end_unbegun)
            self.task.cancel()

    def _end_badly(self, exc: ServiceError) -> None:
        state = ExtractionState.CANCELLED if isinstance(exc, ExtractionCancelled) else ExtractionState.FAILED
        failure = Failure(reason=reason_of(exc), message=exc.message, metadata=exc.metadata)
        try:
            n_rows = self._at_most_wanted(self.set.n_rows(self.columns))
        except Exception as why:  # noqa: BLE001 -- unreadable files may be why it ends, and end it must
            logger.warning("rows of extraction %s can't be told: %s", self.value.id, why)
            n_rows = 0
        self.generation += 1
        self.update(state=state, failure=failure, n_rows=n_rows, rows_per_s=0.0, waiting_for=(), queue_position=0)

    # -- called by the passes over its set ----------------------------------------------------------------------------

    def on_waiting(self, event: Transfer | QueuePosition) -> None:
        """The model loads, or the job waits in a queue."""
        if isinstance(event, Transfer):
            self.update(state=ExtractionState.LOADING, transfer=event, queue_position=0)
        elif (self.value.state, self.value.queue_position) != (ExtractionState.QUEUED, event.position):
            self.update(state=ExtractionState.QUEUED, queue_position=event.position, transfer=None)

    def on_begin(self) -> None:
        """A pass over its columns begins."""
        self._rate.clear()
        self.update(state=ExtractionState.RUNNING, waiting_for=(), queue_position=0, transfer=None)

    def on_committed(self, n_rows: int, n_non_finite: int, n_skipped: int) -> None:
        """Rows before `n_rows` are readable in all its columns."""
        value, n_rows = self.value, self._at_most_wanted(n_rows)
        self.update(
            state=ExtractionState.RUNNING,
            waiting_for=(),
            queue_position=0,
            n_rows=n_rows,
            n_rows_computed=value.n_rows_computed + max(n_rows - value.n_rows, 0),
            rows_per_s=self._rate.at(n_rows, time.monotonic()),
            size_bytes=self._size_bytes(n_rows),
            n_non_finite=n_non_finite,
            n_documents_skipped=n_skipped,
        )

    def on_blocked(self) -> None:
        """The window is full: names the slowest readers, and grants at once the rows that were released meanwhile."""
        self._rate.clear()
        self.update(state=ExtractionState.WAITING, waiting_for=self._readers.slowest(), rows_per_s=0.0)
        self.start_grace()
        self._spawn(self._unblock())

    def on_lost(self) -> None:
        """Goes back to the sealed rows: the rows behind them are computed again, in new files."""
        self.generation += 1
        n_rows = self._at_most_wanted(self.set.n_rows(self.columns))
        self.update(state=ExtractionState.RECOVERING, n_rows=n_rows, rows_per_s=0.0)

    def on_found(self, n_rows: int) -> None:
        """Rows before `n_rows` are sealed already, and more will come."""
        if self._at_most_wanted(n_rows) > self.value.n_rows:
            self.update(n_rows=self._at_most_wanted(n_rows))

    def on_all_rows(self, n_rows: int, n_non_finite: int) -> None:
        """Every row is sealed. Raises CorpusEmpty if there is no row at all."""
        if n_rows == 0:
            raise CorpusEmpty("No row survives the recipe: the documents are empty or the recipe drops every token.")
        self.update(
            state=ExtractionState.DONE,
            n_rows=n_rows,
            n_rows_expected=n_rows,
            n_rows_exact=True,
            n_non_finite=n_non_finite,
            n_documents_skipped=max(self.value.n_documents_skipped, self.set.n_skipped(self.columns)),
            cached=self.value.n_rows_computed == 0 and not self._recovered,
            waiting_for=(),
            queue_position=0,
            size_bytes=self._size_bytes(n_rows),
            receipt=self.set.receipt(self.columns),
        )

    def _at_most_wanted(self, n_rows: int) -> int:
        """`n_rows`, or the rows asked for if that is less: another extraction may want more of the set."""
        return min(n_rows, self.value.spec.max_rows) if self.value.spec.max_rows else n_rows

    def _size_bytes(self, n_rows: int) -> int:
        """Bytes kept of this extraction's own columns; the set may have others."""
        if not self._row_bytes:
            manifest = self.set.manifest()
            self._row_bytes = sum(manifest.column(name).row_bytes for name in self.columns)
        return (n_rows - (self._window.first_kept_row if self._window else 0)) * self._row_bytes

    # -- readers ------------------------------------------------------------------------------------------------------

    def attach(self, name: str, start_row: int, *, shard: Shard = _ALL) -> Reader:
        """Attaches a reader. Raises RowsExpired if its first row was dropped, SetNotFound if the set is gone.

        The first of several shards to come holds the window's rows for all of them until their grace ends.
        """
        if self.set.is_window:
            first_row = self.set.first_kept_row() if self.set.exists else self.value.n_rows
            if start_row < first_row:
                raise rows_expired(start_row, first_row=first_row, n_rows=self.value.n_rows)
        elif self.value.state.ended and self.set.n_rows(self.columns) < self.value.n_rows:
            raise SetNotFound(
                f"Rows of extraction {self.value.id} are not on disk any more: they were evicted, deleted or damaged. "
                "Call StartExtraction with the same spec, which computes them again.",
                metadata={"set_id": self.value.set_id},
                resource=("ActivationSet", self.value.set_id),
            )
        reader = self._readers.attach(name, start_row, shard=shard_key(shard) if shard.count > 1 else "")
        if self._window:
            if shard.count > 1:
                self._readers.expect(shard.count, self._window.first_kept_row, until=self._grace_end())
            self._window.end_grace()
        self.set.note_use()
        self.update(readers=self._readers.statuses())
        return reader

    def release(self, name: str, row: int) -> None:
        """Releases rows before `row` for the reader called `name`; FOR_GOOD: the reader will not come back.

        In a WINDOW set this makes space for the forward pass.
        """
        if row != FOR_GOOD:
            row = min(row, self.value.n_rows)
        self._readers.release(name, row, until=self._grace_end())
        if self._window and self._drop_released(self._window):
            self._spawn(self.passes.grant(self._window.grant_row))

    def detach(self, reader: Reader) -> None:
        """Detaches a reader; after the last one, a WINDOW set has its grace.

        While other readers read, they wait for a reader that is not done to come back, for as long as the grace.
        """
        self._readers.detach(reader, back_until=self._grace_end() if self._window else 0.0)
        self.set.note_use()
        self.update(readers=self._readers.statuses())
        self._services.holder_left.set()
        done = self.value.state == ExtractionState.DONE
        read_out = done and reader.released_row >= self.value.n_rows and self._readers.all_back()
        self.start_grace(read_out=read_out)

    # -- the window ---------------------------------------------------------------------------------------------------

    def _drop_released(self, window: Window) -> bool:
        return window.drop_released(self._readers.released_row(window.first_kept_row))

    async def _unblock(self) -> None:
        """Grants rows as soon as the window has space: a released segment can be dropped only once it is sealed."""
        while self._window and self.value.state == ExtractionState.WAITING:
            if self._drop_released(self._window) or self._window.grant_row > self.value.n_rows:
                await self.passes.grant(self._window.grant_row)
                return
            await asyncio.sleep(SEAL_POLL_S)

    def _grace_end(self) -> float:
        return time.monotonic() + self.value.spec.retention.reader_grace_s

    def start_grace(self, *, read_out: bool = False) -> None:
        """Frees a WINDOW set without readers after its grace, or at once if its readers have read it out."""
        if self._window and not self._readers:
            self._window.start_grace(0.0 if read_out else self.value.spec.retention.reader_grace_s)

    async def _on_abandoned(self, grace_s: float) -> None:
        """Frees everything that a WINDOW set holds after its grace without a reader."""
        await self._end_early(
            ReaderStalled(
                f"Nobody has read extraction {self.value.id} for {grace_s:.0f} s; its window was freed. Start it again "
                "with a reader attached, or with RETAIN."
            )
        )
        if self.task:
            await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(self.set.delete)
        self.update(size_bytes=0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)


def rows_expired(row: int, *, first_row: int, n_rows: int) -> RowsExpired:
    """The error for a row that was dropped."""
    metadata = {"first_available_row": str(first_row), "n_rows": str(n_rows)}
    return RowsExpired(f"Row {row} is gone; the first one still there is {first_row}.", metadata=metadata)
