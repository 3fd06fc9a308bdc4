"""One extraction: lease, forward passes, progress, readers.

A job owns the way of a set from its last sealed row to the end: it leases the model, has the runner append rows,
follows the committed row count, and in a WINDOW set lets rows go behind its readers and grants new ones. A runner that
dies costs the open segment only: the job leases again and the rows are computed anew, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from activation_log import retention
from activation_log.errors import DiskFull
from activation_log.index import SegmentIndex, dropped_rows
from activation_log.manifest import Manifest
from chassis.errors import ServiceError
from extractor_service import window
from extractor_service.errors import (
    CorpusEmpty,
    ExtractionCancelled,
    ExtractionFailed,
    LeaseLost,
    ReaderStalled,
    RegistryUnavailable,
    RowsExpired,
    RunnerLost,
    WaitTimeout,
    error_for,
    reason_of,
)
from extractor_service.estimate import RowCount
from extractor_service.node import Node
from extractor_service.passes import Pass, next_pass
from extractor_service.ports import Models, Runner
from extractor_service.rate import RateMeter
from extractor_service.readers import Reader, Readers
from extractor_service.runner_protocol import Blocked, Committed, Extract, Finished, Grant, Stop
from extractor_service.values import (
    Extraction,
    ExtractionSpec,
    ExtractionState,
    Failure,
    Lease,
    Transfer,
)

LEASE_WAIT_S = 600.0
RUNNER_WAIT_S = 60.0
# Deaths of a runner in a row without a single new row: more would only repeat.
MAX_FRUITLESS_TRIES = 4
# While the registry is away nothing is lost; it is given this long to come back.
RECOVERY_DEADLINE_S = 300.0
# Sealing takes milliseconds; readers must not wait for it longer than they notice.
SEAL_POLL_S = 0.02

_PASSING = (RunnerLost, LeaseLost, RegistryUnavailable, WaitTimeout)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext:
    """What every job needs."""

    models: Models
    node: Node
    save: Callable[[ExtractionJob], None]
    count_rows: Callable[[ExtractionSpec], Awaitable[RowCount]]


class ExtractionJob:
    """Runs one extraction; `value` is always its present state."""

    def __init__(self, value: Extraction, context: JobContext, set_lock: asyncio.Lock, *, corpus_path: Path) -> None:
        self.value = value
        # Restarts must not make `seq` smaller: it starts at the clock.
        self.seq = int(time.time() * 1000)
        self.generation = 0
        self.folder = Path(value.path)
        self.corpus_path = corpus_path
        self.request_ids: set[str] = set()
        self._context = context
        self._set_lock = set_lock
        self._changed = asyncio.Event()
        self._readers = Readers()
        self._runner: Runner | None = None
        self._runs = False
        self._lease: Lease | None = None
        self._stop: ServiceError | None = None
        self._grace: asyncio.Task[None] | None = None
        self._helpers: set[asyncio.Task[None]] = set()
        self._rate = RateMeter()
        self._manifest = Manifest.load(self.folder)
        self._first_kept_row = dropped_rows(self.folder)
        self._is_window = value.spec.retention.is_window
        self.task: asyncio.Task[None] | None = None

    # -- for everyone -------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of this extraction: provenance, then its hookpoints."""
        return self.value.spec.columns

    @property
    def end_row(self) -> int:
        """One past the last row this extraction will have; 0 while unknown."""
        return self.value.n_rows if self.value.state == ExtractionState.DONE else self.value.spec.max_rows

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
            self._context.save(self)

    def failure_error(self) -> ServiceError:
        """What to tell a reader of an extraction that ended without the rows it wants."""
        if self._stop:
            return self._stop
        failure = self.value.failure or Failure(reason="INTERNAL", message="The extraction ended without a reason.")
        return failed_as(failure, self.value)

    # -- running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Brings the extraction to its end."""
        try:
            await self._run()
        except asyncio.CancelledError:
            if self._stop is None:
                raise  # The server goes away; the job goes on when it is back.
            self._end_badly(self._stop)
        except ServiceError as exc:
            self._end_badly(exc)
        except Exception:
            logger.exception("extraction %s hit a bug", self.value.id)
            message = f"Extraction {self.value.id} hit a bug; the node's log has the details."
            self.update(state=ExtractionState.FAILED, failure=Failure(reason="INTERNAL", message=message))
        self.end_unread()

    def end_unread(self) -> None:
        """Frees a WINDOW set after its grace unless somebody reads it."""
        if self._is_window:
            self._start_grace()

    async def cancel(self) -> None:
        """Ends the extraction; rows so far stay."""
        await self._end_early(
            ExtractionCancelled(f"Extraction {self.value.id} was cancelled; start it again to go on.")
        )

    async def _run(self) -> None:
        counting = asyncio.create_task(self._count(), name=f"count-{self.value.id}")
        try:
            async with self._set_lock:
                await self._until_done()
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)

    async def _until_done(self) -> None:
        tries, trouble_since = 0, 0.0
        while not self._covered():
            rows_before = self.value.n_rows
            try:
                async with self._leased_runner() as runner:
                    await self._extract(runner)
                break
            except _PASSING as exc:
                now = time.monotonic()
                fruitful = self.value.n_rows > rows_before
                tries, trouble_since = (1, now) if fruitful or not tries else (tries + 1, trouble_since)
                lost_for_good = isinstance(exc, RunnerLost) and tries >= MAX_FRUITLESS_TRIES
                if self._stop or lost_for_good or now - trouble_since > RECOVERY_DEADLINE_S:
                    raise
                logger.warning("extraction %s recovers: %s", self.value.id, exc.message)
                self._recover()
                await asyncio.sleep(min(0.25 * 2**tries, 5.0))

    def _covered(self) -> bool:
        """Ends at once when every row is there already."""
        manifest, index = Manifest.load(self.folder), SegmentIndex.load(self.folder)
        n_rows, wanted = index.n_rows(self.columns), self.value.spec.max_rows
        if wanted and n_rows >= wanted:
            n_rows = wanted
        elif not (manifest.complete and n_rows == manifest.total_rows):
            self.update(n_rows=n_rows)
            return False
        self._finish(n_rows, cached=self.value.n_rows_computed == 0)
        return True

    def _finish(self, n_rows: int, *, cached: bool) -> None:
        if n_rows == 0:
            raise CorpusEmpty("No row survives the recipe: the documents are empty or the recipe drops every token.")
        self.update(
            state=ExtractionState.DONE,
            n_rows=n_rows,
            n_rows_expected=n_rows,
            n_rows_exact=True,
            cached=cached,
            waiting_for=(),
            size_bytes=self._size_bytes(n_rows),
        )

    @contextlib.asynccontextmanager
    async def _leased_runner(self) -> AsyncIterator[Runner]:
        lease = await self._acquire()
        renewing: asyncio.Task[None] | None = None
        try:
            self._lease = lease
            renewing = asyncio.create_task(self._renew(), name=f"renew-{self.value.id}")
            self._runner, _ = await self._context.node.runner_for(lease.residency_id, RUNNER_WAIT_S)
            yield self._runner
        finally:
            self._runner, self._runs = None, False
            if renewing:
                renewing.cancel()
                await asyncio.gather(renewing, return_exceptions=True)
            with contextlib.suppress(ServiceError):
                await self._context.models.release_lease(self._lease or lease)

    async def _acquire(self) -> Lease:
        await self._context.node.until_registered(RUNNER_WAIT_S)
        holder = f"extraction {self.value.id}"
        model_id = self.value.spec.model_id
        asking = self._context.models.acquire_lease(model_id, holder=holder, wait_s=LEASE_WAIT_S)
        async with contextlib.aclosing(asking) as events:
            async for event in events:
                if isinstance(event, Lease):
                    self.update(transfer=None, queue_position=0)
                    return event
                if isinstance(event, Transfer):
                    self.update(state=ExtractionState.LOADING, transfer=event, queue_position=0)
                else:
                    self.update(state=ExtractionState.QUEUED, queue_position=event)
        raise RegistryUnavailable("The registry ended the stream of a lease before granting it.", retry_after_s=1.0)

    async def _renew(self) -> None:
        """Keeps the lease; while the registry is away, and after the lease was lost, the model simply stays loaded."""
        while lease := self._lease:
            await asyncio.sleep(lease.ttl_s / 3)
            try:
                await self._context.models.renew_lease(lease)
            except RegistryUnavailable:
                logger.info("lease %s can't be renewed now: the registry is away", lease.id)
            except LeaseLost:
                logger.warning("lease %s was lost; a new one is asked for", lease.id)
                with contextlib.suppress(ServiceError):
                    self._lease = await self._acquire()
            except ServiceError as exc:
                logger.warning("lease %s can't be renewed: %s", lease.id, exc.message)

    async def _extract(self, runner: Runner) -> None:
        """Runs passes until every column has every row; columns that lag behind others catch up first, alone."""
        before = -1
        while not self._covered():
            if self.value.n_rows <= before:
                raise ExtractionFailed(f"Extraction {self.value.id} makes no progress; the node's log has more.")
            before = self.value.n_rows
            rows = next_pass(SegmentIndex.load(self.folder), self.columns, self.value.spec.max_rows)
            await self._run_pass(runner, rows)

    async def _run_pass(self, runner: Runner, rows: Pass) -> None:
        spec = self.value.spec
        command = Extract(
            extraction_id=self.value.id,
            set_path=str(self.folder),
            corpus_path=str(self.corpus_path),
            columns=rows.columns,
            max_rows=rows.max_rows,
            grant_row=self._grant_row() if self._is_window else None,
            allow_non_finite=spec.allow_non_finite,
        )
        state = ExtractionState.QUEUED if runner.busy else ExtractionState.RUNNING
        self.update(state=state, waiting_for=(), queue_position=int(runner.busy))
        self._rate.clear()
        async with contextlib.aclosing(runner.run(command, ends=(Finished,))) as events:
            async for event in events:
                self._runs = True
                if isinstance(event, Committed):
                    self._on_committed(event)
                elif isinstance(event, Blocked):
                    await self._on_blocked(runner)
                elif isinstance(event, Finished):
                    self._on_finished(event)

    def _on_committed(self, event: Committed) -> None:
        value = self.value
        self.update(
            state=ExtractionState.RUNNING,
            waiting_for=(),
            queue_position=0,
            n_rows=event.n_rows,
            n_rows_computed=value.n_rows_computed + max(event.n_rows - value.n_rows, 0),
            rows_per_s=self._rate.at(event.n_rows, time.monotonic()),
            size_bytes=self._size_bytes(event.n_rows),
            n_non_finite=event.n_non_finite,
        )

    def _size_bytes(self, n_rows: int) -> int:
        """Bytes kept of this extraction's own columns; the set may have others."""
        row_bytes = sum(self._manifest.column(name).row_bytes for name in self.columns)
        return (n_rows - self._first_kept_row) * row_bytes

    async def _on_blocked(self, runner: Runner) -> None:
        """The window is full: says who is waited for, and grants at once what was released meanwhile."""
        self._rate.clear()
        self.update(
            state=ExtractionState.WAITING,
            waiting_for=self._readers.slowest(),
            rows_per_s=0.0,
        )
        if not self._readers:
            self._start_grace()
        self._spawn(self._unblock(runner))

    def _on_finished(self, event: Finished) -> None:
        if self._stop and not event.complete:
            raise self._stop
        self.update(n_non_finite=event.n_non_finite)

    def _recover(self) -> None:
        """Goes back to what is sealed: the rest will be written anew, in new files."""
        self.generation += 1
        n_rows = SegmentIndex.load(self.folder).n_rows(self.columns)
        self.update(state=ExtractionState.RECOVERING, n_rows=n_rows, rows_per_s=0.0)

    def _end_badly(self, exc: ServiceError) -> None:
        state = ExtractionState.CANCELLED if isinstance(exc, ExtractionCancelled) else ExtractionState.FAILED
        failure = Failure(reason=reason_of(exc), message=exc.message, metadata=exc.metadata)
        n_rows = SegmentIndex.load(self.folder).n_rows(self.columns)
        self.generation += 1
        self.update(state=state, failure=failure, n_rows=n_rows, rows_per_s=0.0, waiting_for=())

    async def _end_early(self, why: ServiceError) -> None:
        if self.value.state.ended or self._stop:
            return
        self._stop = why
        if self._runner and self._runs:
            with contextlib.suppress(RunnerLost):
                await self._runner.send(Stop(extraction_id=self.value.id))
        elif self.task:
            self.task.cancel()

    async def _count(self) -> None:
        """Finds out how many rows there will be; only progress depends on it."""
        try:
            count = await self._context.count_rows(self.value.spec)
        except ServiceError as exc:
            logger.info("rows of extraction %s can't be counted: %s", self.value.id, exc.message)
            return
        wanted = self.value.spec.max_rows
        expected = min(count.n_rows, wanted) if wanted else count.n_rows
        if not self.value.state.ended:
            self.update(n_rows_expected=expected, n_rows_exact=count.exact)

    # -- readers ------------------------------------------------------------------------------------------------------

    def attach(self, name: str, start_row: int) -> Reader:
        """Attaches a reader; raises RowsExpired if its first row is gone."""
        first_row = dropped_rows(self.folder) if self.folder.exists() else self.value.n_rows
        if start_row < first_row:
            raise rows_expired(start_row, first_row=first_row, n_rows=self.value.n_rows)
        reader = self._readers.attach(name, start_row)
        if self._grace:
            self._grace.cancel()
            self._grace = None
        self.update(readers=self._readers.statuses())
        return reader

    def release(self, name: str, row: int) -> None:
        """Lets rows before `row` go for the reader called `name`; one that has left has released everything."""
        if reader := self._readers.named(name):
            self.release_reader(reader, row)

    def release_reader(self, reader: Reader, row: int) -> None:
        """Lets rows before `row` go; in a WINDOW set this makes room for the forward pass."""
        reader.released_row = max(reader.released_row, min(row, self.value.n_rows))
        if self._is_window and self._make_room() and self._runner:
            self._spawn(self._send_grant(self._runner))

    def detach(self, reader: Reader) -> None:
        """Detaches a reader. The last one of a WINDOW set leaves it to itself after its grace."""
        self._readers.detach(reader)
        self.update(readers=self._readers.statuses())
        if self._is_window and not self._readers:
            self._start_grace(read_out=self.value.state.ended and reader.released_row >= self.value.n_rows)

    def _make_room(self) -> bool:
        """Drops what every reader has released; False if there was nothing to drop."""
        before = self._first_kept_row
        released = self._readers.released_row(before)
        if released - before < self._manifest.segment_rows:
            return False
        try:
            self._first_kept_row = retention.drop_before(self.folder, released)
        except DiskFull as exc:  # What goes must be on record first; the next release tries again.
            logger.warning("extraction %s can't let rows go: %s", self.value.id, exc)
        return self._first_kept_row > before

    async def _unblock(self, runner: Runner) -> None:
        """Grants rows as soon as there is room: a released segment can only be dropped once it is sealed."""
        while self.value.state == ExtractionState.WAITING:
            if self._make_room() or self._grant_row() > self.value.n_rows:
                await self._send_grant(runner)
                return
            await asyncio.sleep(SEAL_POLL_S)

    async def _send_grant(self, runner: Runner) -> None:
        with contextlib.suppress(RunnerLost):
            await runner.send(Grant(extraction_id=self.value.id, row=self._grant_row()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    def _grant_row(self) -> int:
        return window.grant_row(
            self._manifest,
            window_bytes=self.value.spec.retention.window_bytes,
            first_kept_row=self._first_kept_row,
        )

    def _start_grace(self, *, read_out: bool = False) -> None:
        if self._grace is None and not self._readers:
            grace_s = 0.0 if read_out else self.value.spec.retention.reader_grace_s
            self._grace = asyncio.create_task(self._end_of_grace(grace_s), name=f"grace-{self.value.id}")

    async def _end_of_grace(self, grace_s: float) -> None:
        """Frees everything a WINDOW set holds when nobody has read it for its grace."""
        await asyncio.sleep(grace_s)
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

    async def close(self) -> None:
        """Ends the job's tasks without ending the extraction: the server goes away."""
        tasks = [task for task in (self.task, self._grace, *self._helpers) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _is_set(event: asyncio.Event, timeout_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
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
