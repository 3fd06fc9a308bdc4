"""The passes over one set, for all extractions that want rows of it.

Extractions of one set share its passes: what they want is merged whenever a pass begins, so that a column is computed
once, whoever asks. One that comes while a pass runs joins it as long as it has no rows; later it waits, and catches up
its own columns. If a merged pass fails, each of its extractions is tried alone: nobody fails for another's columns.
A runner that dies costs what is not sealed yet; the rows are computed anew, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import (
    DiskFull,
    ExtractionFailed,
    LeaseLost,
    NonFinite,
    RegistryUnavailable,
    RunnerLost,
    WaitTimeout,
)
from headrace_extractor.extractions.leasing import Leasing
from headrace_extractor.extractions.passes import Pass, has_all, next_pass
from headrace_extractor.extractions.ports import Corpora, Models
from headrace_extractor.extractions.running_pass import Rider, RunningPass
from headrace_extractor.extractions.turns import Turns
from headrace_extractor.meters import Transfer
from headrace_extractor.node.node import Node
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.runner_protocol import Blocked, Committed, Extract, Finished, Grant, Message
from headrace_extractor.sets.identity import check_same_model
from headrace_extractor.sets.ports import Room
from headrace_log.finite import non_finite
from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

# Deaths of a runner in a row without a single new row: more would only repeat.
MAX_FRUITLESS_TRIES = 4
# While the registry is away nothing is lost; it is given this long to come back.
RECOVERY_DEADLINE_S = 300.0

_PASSING = (RunnerLost, LeaseLost, RegistryUnavailable, WaitTimeout)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What the passes of every set need."""

    models: Models
    node: Node
    corpora: Corpora
    room: Room
    turns: WeakKeyDictionary[Runner, Turns]


class SetPasses:
    """Runs passes while somebody wants rows of the set that it lacks."""

    def __init__(self, folder: Path, context: PassContext) -> None:
        self._folder = folder
        self._context = context
        self._riders: dict[Rider, asyncio.Future[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._running: RunningPass | None = None
        self._ending = False
        self._leased_at = 0.0  # 0 while there is no lease.
        self._apart = False  # A merged pass has failed: one rider at a time.

    def settled(self, rider: Rider) -> bool:
        """Tells the rider how far its rows are; True when it has them all.

        Raises NonFinite where others have let in what it does not allow.
        """
        manifest, index = Manifest.load(self._folder), SegmentIndex.load(self._folder)
        want = rider.want
        n_rows = index.n_rows(want.columns)
        counts = non_finite(self._folder, index, want.columns, want.max_rows or n_rows)
        if counts and not _allows(rider):
            raise _not_allowed(counts)
        if not has_all(index, want, manifest.total_rows):
            rider.on_found(n_rows)
            return False
        rider.on_all_rows(min(n_rows, want.max_rows) if want.max_rows else n_rows, sum(counts.values()))
        return True

    async def complete(self, rider: Rider) -> None:
        """Returns once every row that the rider wants is there; raises what keeps it from being so."""
        if self._ending and self._task:
            await asyncio.wait([self._task])
        if self.settled(rider):
            return
        over = self._riders[rider] = asyncio.get_running_loop().create_future()
        try:
            if self._task is None or self._task.done():
                self._apart = self._ending = False
                self._task = asyncio.create_task(self._drive(), name=f"passes-{self._folder.name}")
            else:
                rider.on_waiting(1)
                await self._board(rider)
            await over
        finally:
            del self._riders[rider]
            if not self._riders:
                await self._end_drive()

    async def _end_drive(self) -> None:
        """Nobody wants rows any more: gives the lease back before the last one is told so."""
        if self._task:
            self._ending = True
            self._task.cancel()
            await asyncio.wait([self._task])

    async def stop(self, rider: Rider) -> bool:
        """Ends a rider with its `stop`, whose rows so far stay; False if it does not ride."""
        over = self._riders.get(rider)
        if over is None or over.done():
            return over is not None
        running = self._running
        rest = [other for other in self._riders if other is not rider and not other.stop]
        if running is None or not running.heard or rider not in running.aboard or running.serves(rest):
            assert rider.stop is not None
            over.set_exception(rider.stop)
        else:  # What it has is sealed first; columns that nobody else wants are not computed any further.
            await running.end()
        return True

    async def grant(self, row: int) -> None:
        """Lets the running pass of a WINDOW set write up to `row`."""
        if self._running:
            await self._running.send(Grant(set_id=self._id, row=row))

    @property
    def _id(self) -> str:
        return self._folder.name

    # -- the drive ----------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        try:
            await self._until_all_have_all()
        except Exception as exc:  # noqa: BLE001 -- whoever waits gets it
            self._fail(list(self._riders), exc)

    async def _until_all_have_all(self) -> None:
        tries, trouble_since = 0, 0.0
        while self._settle():
            rows_before, self._leased_at = self._rows(), 0.0
            try:
                await self._lease_and_run()
            except _PASSING as exc:
                now = time.monotonic()
                # Long in line with a lease, behind other sets, is no trouble.
                went_well = 0.0 < self._leased_at < now - RECOVERY_DEADLINE_S or self._rows() > rows_before
                left_alone_s = float(exc.metadata.get("left_alone_s", "0"))
                if went_well or not trouble_since:
                    tries, trouble_since = 0, now
                tries += not left_alone_s  # Where the registry asked for a pause, nothing was tried.
                lost_for_good = isinstance(exc, RunnerLost) and tries >= MAX_FRUITLESS_TRIES
                if lost_for_good or now + left_alone_s - trouble_since > RECOVERY_DEADLINE_S:
                    raise
                logger.warning("passes over set %s recover: %s", self._id, exc.message)
                self._lose()
                await asyncio.sleep(max(left_alone_s, min(0.25 * 2**tries, 5.0)))

    async def _lease_and_run(self) -> None:
        first = next(iter(self._riders))
        leasing = Leasing(
            self._context.models, self._context.node, model_id=first.value.spec.model_id, tell=self._tell_waiting
        )
        async with leasing.runner(f"extraction {first.value.id}") as (runner, loaded):
            self._leased_at = time.monotonic()
            check_same_model(Manifest.load(self._folder).identity, first.value.spec, loaded)
            turns = self._context.turns.setdefault(runner, Turns())
            done: tuple[Pass, int] | None = None
            while self._settle():
                async with turns.turn(self._tell_waiting):
                    done = await self._next(runner, done)

    async def _next(self, runner: Runner, done: tuple[Pass, int] | None) -> tuple[Pass, int] | None:
        """Runs the next pass; returns it and its first row unless it was cut short. Raises if it is `done` again."""
        manifest, index = Manifest.load(self._folder), SegmentIndex.load(self._folder)
        aboard = self._aboard()
        planned = next_pass(index, [rider.want for rider in aboard], manifest.total_rows)
        if planned is None:
            return None
        if (planned, index.n_rows(planned.columns)) == done:
            raise ExtractionFailed(f"Set {self._id} makes no progress; the node's log has more.")
        running = RunningPass(self._id, runner, planned, index, aboard)
        try:
            await self._run_pass(running)
        except _PASSING:
            raise
        except DiskFull as exc:
            if not await self._context.room.make_room(_required_bytes(exc)):
                self._fail(aboard, exc)
            self._lose()
        except ServiceError as exc:
            self._apart = True
            if len(aboard) == 1:
                self._fail(aboard, exc)
            self._lose()
        else:
            return None if running.cut_short else (planned, running.first_row)
        return None

    async def _run_pass(self, running: RunningPass) -> None:
        first = running.aboard[0]
        command = Extract(
            set_id=self._id,
            set_path=str(self._folder),
            corpus_path=str(self._context.corpora.path(first.value.spec.corpus_id)),
            columns=running.planned.columns,
            max_rows=running.planned.max_rows,
            grant_row=first.grant_row,
            allow_non_finite=first.value.spec.allow_non_finite,
        )
        self._running = running
        try:
            self._tell_begin(running)
            async with contextlib.aclosing(running.runner.run(command, ends=(Finished,))) as events:
                async for event in events:
                    running.heard = True
                    self._on_event(running, event)
        finally:
            self._running = None

    def _tell_begin(self, running: RunningPass) -> None:
        in_it = running.in_it()
        for rider in self._waiting_riders():
            if rider in in_it:
                rider.on_begin()
            else:
                rider.on_waiting(1)

    def _on_event(self, running: RunningPass, event: Message) -> None:
        if isinstance(event, Committed):
            running.n_rows, running.n_non_finite = event.n_rows, event.n_non_finite
            for rider in running.in_it():
                rider.on_committed(running.rows_of(rider), event.n_non_finite)
            if running.has_all_of_any() and running.index_grew(self._folder):
                self._settle()
        elif isinstance(event, Blocked):
            running.aboard[0].on_blocked()
        elif isinstance(event, Finished) and event.n_rows < running.n_rows:
            # Of a segment that other columns have, nothing is sealed before it is full.
            for rider in running.in_it():
                rider.on_lost()

    # -- who rides ----------------------------------------------------------------------------------------------------

    def _aboard(self) -> list[Rider]:
        """Whose wants the next pass merges: all of one mind about values that are not finite."""
        riders = self._waiting_riders()
        if self._apart:
            return riders[:1]
        return [rider for rider in riders if _allows(rider) == _allows(riders[0])]

    async def _board(self, rider: Rider) -> None:
        """Lets one that comes late into the running pass, if that computes all it lacks or has no rows yet."""
        running = self._running
        if running is None or self._apart or _allows(rider) != _allows(running.aboard[0]):
            return
        if running.covers(rider):
            running.aboard.append(rider)
            rider.on_begin()
            rider.on_found(running.rows_of(rider))
        elif running.n_rows == running.first_row and self._merges(running, rider):
            await running.end()

    def _merges(self, running: RunningPass, rider: Rider) -> bool:
        """True if the pass, begun again, would compute the rider's columns along with its own."""
        wants = [other.want for other in (*running.aboard, rider)]
        planned = next_pass(SegmentIndex.load(self._folder), wants, Manifest.load(self._folder).total_rows)
        return planned is not None and set(planned.columns) > set(running.planned.columns)

    def _settle(self) -> bool:
        """Ends riders that have all their rows; True while others have not."""
        for rider, over in list(self._riders.items()):
            if over.done():
                continue
            try:
                if self.settled(rider):
                    over.set_result(None)
                elif rider.stop and self._running is None:
                    over.set_exception(rider.stop)
            except ServiceError as exc:
                over.set_exception(exc)
        return bool(self._waiting_riders())

    def _waiting_riders(self) -> list[Rider]:
        return [rider for rider, over in self._riders.items() if not over.done()]

    def _fail(self, riders: Iterable[Rider], exc: BaseException | None) -> None:
        for rider in riders:
            over = self._riders.get(rider)
            if over and not over.done():
                over.set_exception(rider.stop or exc or ExtractionFailed("The pass ended without a reason."))

    def _lose(self) -> None:
        for rider in self._waiting_riders():
            rider.on_lost()

    def _tell_waiting(self, event: Transfer | int) -> None:
        for rider in self._waiting_riders():
            rider.on_waiting(event)

    def _rows(self) -> int:
        """Sealed rows over all columns wanted: grows with every segment."""
        index = SegmentIndex.load(self._folder)
        return sum(index.n_rows([name]) for name in {name for rider in self._riders for name in rider.want.columns})


def _allows(rider: Rider) -> bool:
    return rider.value.spec.allow_non_finite


def _not_allowed(counts: Mapping[str, int]) -> NonFinite:
    names = ", ".join(sorted(counts))
    return NonFinite(
        f"{sum(counts.values())} values of {names} in this set are NaN or infinite, which another extraction allowed; "
        "use a storage or compute dtype of wider range, or allow_non_finite.",
        metadata={"hookpoint": names},
    )


def _required_bytes(exc: ServiceError) -> int:
    return int(exc.metadata.get("required_bytes", "0") or 0)
