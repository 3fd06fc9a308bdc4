"""The passes over one set, for all extractions that want rows of it.

Extractions of one set share its passes: their wants are merged whenever a pass begins, so a column is computed once,
however many extractions ask for it. An extraction that comes while a pass runs joins the pass if that computes all the
rows it lacks, or has none yet; otherwise it waits, and a later pass computes its columns. If a merged pass fails, its
extractions are tried one at a time, so that none fails for the columns of another. A runner that dies costs the rows
that are not sealed yet; they are computed again, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import (
    DiskFull,
    ExtractionFailed,
    ExtractorError,
    LeaseLost,
    NonFinite,
    RegistryUnavailable,
    RunnerLost,
    WaitTimeout,
)
from headrace_extractor.extractions.leasing import Leasing
from headrace_extractor.extractions.passes import Pass, has_all, next_pass
from headrace_extractor.extractions.ports import QueuePosition
from headrace_extractor.extractions.running_pass import RunningPass
from headrace_extractor.extractions.services import Services
from headrace_extractor.meters import Transfer
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.runner_protocol import Blocked, Committed, Extract, Finished, Grant, Message
from headrace_extractor.node.turns import Turns
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_extractor.sets.identity import check_same_model

if TYPE_CHECKING:
    from headrace_extractor.extractions.job import ExtractionJob

# Deaths of a runner in a row without a single new row: more tries would only repeat them.
MAX_FRUITLESS_TRIES = 4
# While the registry is away no row is lost; it has this long to come back.
RECOVERY_DEADLINE_S = 300.0

# The position of a job whose columns the running pass does not compute.
_BEHIND_A_PASS = QueuePosition(1)

_PASSING = (RunnerLost, LeaseLost, RegistryUnavailable, WaitTimeout)

logger = logging.getLogger(__name__)


class SetPasses:
    """Leases the set's model and runs passes for as long as jobs want rows that the set lacks."""

    def __init__(self, of: ActivationSet, services: Services) -> None:
        self._set = of
        self._services = services
        # Jobs that wait for rows, in the order in which they came; a future is done when its job need not wait longer.
        self._jobs: dict[ExtractionJob, asyncio.Future[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._running: RunningPass | None = None
        self._ending = False
        self._leased_at = 0.0  # On the monotonic clock; 0 while there is no lease.
        self._apart = False  # True once a merged pass has failed: then each pass is for one job.

    async def complete(self, job: ExtractionJob) -> None:
        """Returns once the job has all its rows; raises the error that keeps it from having them."""
        if self._ending and self._task:
            await asyncio.wait([self._task])
        if self.tell_rows(job):
            return
        over = self._jobs[job] = asyncio.get_running_loop().create_future()
        try:
            if self._task is None or self._task.done():
                self._apart = self._ending = False
                self._task = asyncio.create_task(self._drive(), name=f"passes-{self._set.folder.name}")
            else:
                job.on_waiting(_BEHIND_A_PASS)
                await self._board(job)
            await over
        finally:
            del self._jobs[job]
            if not self._jobs and self._task:  # The lease is given back before the last job ends.
                self._ending = True
                self._task.cancel()
                await asyncio.wait([self._task])

    def tell_rows(self, job: ExtractionJob) -> bool:
        """Tells a job how many of its rows are sealed; returns True if that is all of them.

        Raises NonFinite if the set has values that this job does not allow; another job let them in.
        """
        total_rows, index, want = self._set.manifest().total_rows, self._set.index(), job.want
        n_rows = index.n_rows(want.columns)
        counts = self._set.n_non_finite(want.columns, want.max_rows or n_rows)
        if counts and not job.allows_non_finite:
            names = ", ".join(sorted(counts))
            raise NonFinite(
                f"{sum(counts.values())} values of {names} in this set are NaN or infinite, which another extraction "
                "allowed; use a storage or compute dtype of wider range, or allow_non_finite.",
                metadata={"hookpoint": names},
            )
        if not has_all(index, want, total_rows):
            job.on_found(n_rows)
            return False
        job.on_all_rows(min(n_rows, want.max_rows) if want.max_rows else n_rows, sum(counts.values()))
        return True

    async def leave(self, job: ExtractionJob) -> bool:
        """Ends the wait of a job with its `end_reason`, its rows so far kept; False if it does not wait."""
        over = self._jobs.get(job)
        if over is None or over.done():
            return over is not None
        running = self._running
        rest = [other for other in self._jobs if other is not job and not other.end_reason]
        if running is None or not running.heard or job not in running.aboard or running.serves(rest):
            assert job.end_reason is not None
            over.set_exception(job.end_reason)
        else:  # The job's rows are sealed first; a column that no other job wants is not computed any further.
            await running.end()
        return True

    async def grant(self, row: int) -> None:
        """Lets the running pass of a WINDOW set write up to `row`."""
        if self._running:
            await self._running.send(Grant(set_id=self._set.id, row=row))

    # -- the drive ----------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        """Leases the model and runs passes until every job has its rows; waits out a lost lease, runner or registry."""
        trouble = _Trouble()
        try:
            while self._end_served_jobs():
                rows_before, self._leased_at = self._sealed_rows(), 0.0
                try:
                    await self._lease_and_run()
                except _PASSING as exc:
                    now = time.monotonic()
                    # A job that has its lease, and waits long for its turn behind other sets, is in no trouble.
                    went_well = 0.0 < self._leased_at < now - RECOVERY_DEADLINE_S or self._sealed_rows() > rows_before
                    pause_s = trouble.pause_after(exc, went_well=went_well, now=now)
                    logger.warning("passes over set %s recover: %s", self._set.id, exc.message)
                    self._tell_lost()
                    await asyncio.sleep(pause_s)
        except Exception as exc:  # noqa: BLE001 -- the jobs that wait get it
            self._fail(list(self._jobs), exc)

    async def _lease_and_run(self) -> None:
        first = next(iter(self._jobs)).value
        leasing = Leasing(
            self._services.models,
            self._services.node,
            model_id=first.spec.model_id,
            holder=f"extraction {first.id}",
            tell=self._tell_waiting,
        )
        async with leasing.runner() as (runner, loaded):
            self._leased_at = time.monotonic()
            check_same_model(self._set.manifest().identity, first.spec, loaded)
            turns = self._services.turns.setdefault(runner, Turns())
            done: tuple[Pass, int] | None = None
            while self._end_served_jobs():
                async with turns.turn(lambda position: self._tell_waiting(QueuePosition(position))):
                    done = await self._run_next_pass(runner, done)

    async def _run_next_pass(self, runner: Runner, done: tuple[Pass, int] | None) -> tuple[Pass, int] | None:
        """Runs the next pass; returns it and its first row, or None if it was cut short or failed.

        Raises ExtractionFailed if the next pass is `done`, the last one that ran to its end: it sealed no row.
        """
        await self._set.mend()
        total_rows, index, aboard = self._set.manifest().total_rows, self._set.index(), self._next_aboard()
        planned = next_pass(index, [job.want for job in aboard], total_rows)
        if planned is None:
            return None
        if (planned, index.n_rows(planned.columns)) == done:
            raise ExtractionFailed(f"Set {self._set.id} makes no progress; the node's log has more.")
        running = RunningPass(self._set, runner, planned, index, aboard)
        try:
            await self._run(running)
        except _PASSING:
            raise
        except DiskFull as exc:
            if not await self._services.keeper.free_space(int(exc.metadata.get("required_bytes", "0") or 0)):
                self._fail(aboard, exc)
            self._tell_lost()
        except ServiceError as exc:
            self._apart = True
            if len(aboard) == 1:
                self._fail(aboard, exc)
            self._tell_lost()
        else:
            return None if running.cut_short else (planned, running.first_row)
        return None

    async def _run(self, running: RunningPass) -> None:
        first = running.aboard[0]
        command = Extract(
            set_id=self._set.id,
            set_path=str(self._set.folder),
            corpus_path=str(self._services.corpora.path(first.value.spec.corpus_id)),
            columns=running.planned.columns,
            max_rows=running.planned.max_rows,
            grant_row=first.grant_row,
            allow_non_finite=first.allows_non_finite,
        )
        self._running = running
        try:
            growing = running.growing()
            for job in self._waiting():
                if job in growing:
                    job.on_begin()
                else:
                    job.on_waiting(_BEHIND_A_PASS)
            async with contextlib.aclosing(running.runner.run(command, ends=(Finished,))) as events:
                async for event in events:
                    running.heard = True
                    self._on_event(running, event)
        finally:
            self._running = None

    def _on_event(self, running: RunningPass, event: Message) -> None:
        if isinstance(event, Committed):
            running.n_rows = event.n_rows
            for job in running.growing():
                job.on_committed(running.rows_of(job), event.n_non_finite, event.n_skipped)
            if running.any_has_its_rows() and running.sealed_more():
                self._end_served_jobs()
        elif isinstance(event, Blocked):
            running.aboard[0].on_blocked()
        elif isinstance(event, Finished) and event.n_rows < running.n_rows:
            # Rows of a segment that other columns have already are sealed only when the segment is full.
            for job in running.growing():
                job.on_lost()

    # -- the jobs -----------------------------------------------------------------------------------------------------

    def _next_aboard(self) -> list[ExtractionJob]:
        """The jobs that the next pass is for: all that treat values that are not finite alike."""
        jobs = self._waiting()
        if self._apart:
            return jobs[:1]
        return [job for job in jobs if job.allows_non_finite == jobs[0].allows_non_finite]

    async def _board(self, job: ExtractionJob) -> None:
        """Lets a late job into the running pass, if that computes all it lacks or has no rows yet."""
        running = self._running
        if running is None or self._apart or job.allows_non_finite != running.aboard[0].allows_non_finite:
            return
        if running.covers(job):
            running.aboard.append(job)
            job.on_begin()
            job.on_found(running.rows_of(job))
        elif running.n_rows == running.first_row:
            wants = [other.want for other in (*running.aboard, job)]
            merged = next_pass(self._set.index(), wants, self._set.manifest().total_rows)
            if merged is not None and set(merged.columns) > set(running.planned.columns):
                await running.end()  # The pass begins again, with the job's columns.

    def _end_served_jobs(self) -> bool:
        """Ends the wait of jobs that have all their rows; True while others wait."""
        for job in self._waiting():
            over = self._jobs[job]
            try:
                if self.tell_rows(job):
                    over.set_result(None)
                elif job.end_reason and self._running is None:
                    over.set_exception(job.end_reason)
            except ServiceError as exc:
                over.set_exception(exc)
        return bool(self._waiting())

    def _waiting(self) -> list[ExtractionJob]:
        return [job for job, over in self._jobs.items() if not over.done()]

    def _fail(self, jobs: Iterable[ExtractionJob], exc: BaseException) -> None:
        for job in jobs:
            over = self._jobs.get(job)
            if over and not over.done():
                over.set_exception(job.end_reason or exc)

    def _tell_lost(self) -> None:
        for job in self._waiting():
            job.on_lost()

    def _tell_waiting(self, event: Transfer | QueuePosition) -> None:
        for job in self._waiting():
            job.on_waiting(event)

    def _sealed_rows(self) -> int:
        """Sealed rows, added up over all columns that jobs want: grows with every segment."""
        index = self._set.index()
        return sum(index.n_rows([name]) for name in {name for job in self._jobs for name in job.columns})


@dataclass(slots=True)
class _Trouble:
    """Losses of lease, runner or registry in a row: how often, and since when on the monotonic clock."""

    n_tries: int = 0
    since: float = 0.0

    def pause_after(self, exc: ExtractorError, *, went_well: bool, now: float) -> float:
        """Seconds to wait before the next try. Raises the error itself once it is not to be waited out any more."""
        if went_well or not self.since:
            self.n_tries, self.since = 0, now
        if not exc.left_alone_s:  # Where the registry asked for a pause, nothing was tried.
            self.n_tries += 1
        lost_for_good = isinstance(exc, RunnerLost) and self.n_tries >= MAX_FRUITLESS_TRIES
        if lost_for_good or now + exc.left_alone_s - self.since > RECOVERY_DEADLINE_S:
            raise exc
        return max(exc.left_alone_s, min(0.25 * 2.0**self.n_tries, 5.0))
