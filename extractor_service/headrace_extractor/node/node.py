"""A node: holds what the registry wants held, and tells it how that stands.

The desired state is in the registry; this reconciles towards it and can be killed at any point. Each residency is one
runner process. While the registry is away everything goes on as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from headrace_chassis.errors import ServiceError
from headrace_chassis.meters import Meter
from headrace_extractor.errors import (
    EpochStale,
    Failure,
    LoadFailed,
    RegistryUnavailable,
    RunnerLost,
    WaitTimeout,
    reason_of,
)
from headrace_extractor.meters import Transfer
from headrace_extractor.node.builds import Builds
from headrace_extractor.node.ports import NodeRegistry, Runner, RunnerFactory
from headrace_extractor.node.reclaim import BACK_DEADLINE_S, Endings, Level, Losses
from headrace_extractor.node.reporting import REPORT_INTERVAL_S, RETRY_S, try_to_tell
from headrace_extractor.node.runner_protocol import Load, Loaded, Loading
from headrace_extractor.node.validations import Validations
from headrace_extractor.node.values import Assignment, DesiredState, Device, Machine, ResidencyReport

# 400 GB from a slow disk; longer is a hang.
LOAD_DEADLINE_S = 3600.0

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Holding:
    """A residency this node loads or holds."""

    assignment: Assignment
    runner: Runner | None = None
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    measured_bytes: int = 0
    level: Level | None = None
    task: asyncio.Task[None] | None = None

    @property
    def held_bytes(self) -> int:
        """What it takes of its device, as far as anybody knows."""
        return max(self.measured_bytes, self.assignment.reserved_bytes)


class Node:
    """Reconciles this node with the registry's desired state until it is cancelled."""

    def __init__(
        self,
        registry: NodeRegistry,
        start_runner: RunnerFactory,
        devices: Callable[[], Sequence[Device]],
        *,
        environment: Mapping[str, str],
        machine: Callable[[], Machine] = Machine,
        back_deadline_s: float = BACK_DEADLINE_S,
    ) -> None:
        self._registry = registry
        self._start_runner = start_runner
        self._devices = devices
        self._environment = environment
        self._machine = machine
        self._runtime_bytes = 0
        self._losses = Losses()
        self._endings = Endings(devices, self._losses, deadline_s=back_deadline_s)
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[int]] = set()
        self._holdings: dict[str, Holding] = {}
        self._builds = Builds(registry, start_runner, epoch=lambda: self.epoch, environment=environment)
        self._validations = Validations(
            registry, start_runner, devices, epoch=lambda: self.epoch, environment=environment
        )
        self._desired: DesiredState = DesiredState()
        self.epoch = 0
        self.registered = asyncio.Event()
        self.on_registered: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Registers, then heartbeats and reconciles; registers anew whenever the epoch turns out to be stale."""
        try:
            while True:
                try:
                    await self._live_one_epoch()
                except ServiceError as exc:  # Whatever it is, models stay loaded and readers stay served.
                    self.registered.clear()
                    level = logging.INFO if isinstance(exc, RegistryUnavailable | EpochStale) else logging.ERROR
                    logger.log(level, "registering again: %s", exc.message)
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._end_everything()

    async def until_registered(self, deadline_s: float) -> None:
        """Waits until the registry knows this node's present epoch; RegistryUnavailable past the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self.registered.wait()
        except TimeoutError:
            raise RegistryUnavailable(
                f"The registry could not be reached for {deadline_s:.0f} s.", retry_after_s=RETRY_S
            ) from None

    async def runner_for(self, residency_id: str, deadline_s: float) -> tuple[Runner, Assignment]:
        """Waits until a residency is loaded here; WaitTimeout past the deadline, RunnerLost if it is given up."""
        end, desired = time.monotonic() + deadline_s, self._desired
        while time.monotonic() < end:
            holding = self._holdings.get(residency_id)
            if holding and holding.loaded.is_set() and holding.runner:
                return holding.runner, holding.assignment
            # Not wanted since: a registry that was away may have granted what had died meanwhile.
            if holding is None and self._desired is not desired and not self._desired.holds(residency_id):
                raise RunnerLost(f"Residency {residency_id} ended as it was granted; try again.", retry_after_s=RETRY_S)
            await asyncio.sleep(0.05)
        raise WaitTimeout(
            f"Residency {residency_id} was granted but is not on this node after {deadline_s:.0f} s; try again.",
            retry_after_s=RETRY_S,
        )

    async def _live_one_epoch(self) -> None:
        self.epoch, interval_s = await self._registry.register(*await self._facts())
        logger.info("registered as epoch %d", self.epoch)
        self.registered.set()
        self.on_registered()
        heartbeats = asyncio.create_task(self._heartbeat(interval_s), name="heartbeat")
        watching = asyncio.create_task(self._watch(), name="assignments")
        try:
            done, _ = await asyncio.wait((heartbeats, watching), return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in (heartbeats, watching):
                task.cancel()
            await asyncio.gather(heartbeats, watching, return_exceptions=True)

    async def _heartbeat(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            await self._registry.heartbeat(self.epoch, *await self._facts())

    async def _facts(self) -> tuple[tuple[Device, ...], Machine]:
        devices = await asyncio.to_thread(self._devices)
        return self._losses.marked(devices), replace(self._machine(), runtime_bytes=self._runtime_bytes)

    async def _watch(self) -> None:
        async with aclosing(self._registry.assignments(self.epoch)) as states:
            async for desired in states:
                await self._reconcile(desired)
        raise RegistryUnavailable("The registry ended the stream of assignments.", retry_after_s=RETRY_S)

    async def _reconcile(self, desired: DesiredState) -> None:
        self._desired = desired
        wanted = {a.residency_id: a for a in desired.assignments if a.hold}
        ending = {a.residency_id: a for a in desired.assignments if not a.hold}
        for residency_id in [r for r in self._holdings if r not in wanted and r not in ending]:
            await self._let_go(residency_id)  # Its memory counts for nothing any more: first it, then what is new.
        for assignment in ending.values():
            if assignment.residency_id not in self._ending:
                unloading = asyncio.create_task(self._unload(assignment), name=f"unload-{assignment.residency_id}")
                self._ending[assignment.residency_id] = unloading
        for assignment in wanted.values():
            await self._hold(assignment)
        self._builds.follow(desired.builds)
        await self._validations.follow(desired.validations)

    async def _hold(self, assignment: Assignment) -> None:
        holding = self._holdings.get(assignment.residency_id)
        if holding is None:
            holding = self._holdings[assignment.residency_id] = Holding(assignment)
            holding.task = asyncio.create_task(self._load_and_watch(holding), name=f"hold-{assignment.residency_id}")
            return
        # What it computes is what it was loaded with, whatever the registry has come to say of the model.
        holding.assignment = replace(assignment, model=holding.assignment.model)
        if holding.loaded.is_set() and assignment.state != "RESIDENT":
            await self._report_resident(holding)

    async def _load_and_watch(self, holding: Holding) -> None:
        """Loads one model, and tells the registry when its process dies."""
        deadline: asyncio.Timeout | None = None
        try:
            holding.runner = runner = await self._start_runner(environment=self._environment)
            async with asyncio.timeout(LOAD_DEADLINE_S) as deadline:
                await self._load(holding, runner)
            holding.loaded.set()
            await self._report_resident(holding)
            holding.level = await self._endings.level_of(holding.assignment.device_id)
            await runner.wait()
            raise RunnerLost("The model's process died; it is loaded again on demand.", retry_after_s=RETRY_S)
        except (ServiceError, OSError) as raised:
            exc = raised if isinstance(raised, ServiceError) else _load_failed(raised, deadline)
            logger.warning("residency %s failed: %s", holding.assignment.residency_id, exc.message)
            self._holdings.pop(holding.assignment.residency_id, None)
            lost_bytes = await self._end_runner(holding)
            await self._report(
                ResidencyReport(
                    residency_id=holding.assignment.residency_id,
                    fence=holding.assignment.fence,
                    state="FAILED",
                    failure=Failure(reason=reason_of(exc), message=exc.message, metadata=exc.metadata),
                    lost_bytes=lost_bytes,
                )
            )

    async def _load(self, holding: Holding, runner: Runner) -> None:
        assignment = holding.assignment
        command = Load(
            files_path=assignment.model.files_path,
            device=assignment.device_id,
            dtype=assignment.model.compute_dtype(assignment.device_id),
            quantization=assignment.model.quantization,
            load_options=dict(assignment.model.load_options),
        )
        meter, reported = Meter(), 0.0
        meter.at(0, time.monotonic())
        async for event in runner.run(command, ends=(Loaded,)):
            now = time.monotonic()
            if isinstance(event, Loading) and now - reported >= REPORT_INTERVAL_S:
                reported = now
                rate = meter.at(event.done_bytes, now)
                await self._report(
                    ResidencyReport(
                        residency_id=assignment.residency_id,
                        fence=holding.assignment.fence,
                        state="LOADING",
                        transfer=Transfer(
                            done_bytes=event.done_bytes, total_bytes=event.total_bytes, rate_bytes_per_s=rate
                        ),
                    ),
                    attempts=1,
                )
            elif isinstance(event, Loaded):
                holding.measured_bytes = event.measured_bytes
                self._runtime_bytes = self._runtime_bytes or event.runtime_bytes
                self._losses.taken(assignment.device_id, event.measured_bytes)

    async def _report_resident(self, holding: Holding) -> None:
        await self._report(
            ResidencyReport(
                residency_id=holding.assignment.residency_id,
                fence=holding.assignment.fence,
                state="RESIDENT",
                measured_bytes=holding.measured_bytes,
            )
        )

    async def _report(self, report: ResidencyReport, attempts: int = 3) -> None:
        """Reports; gives up after a while, since the desired state is sent again and answered again."""
        await try_to_tell(
            lambda: self._registry.report_residency(self.epoch, report),
            attempts,
            f"{report.residency_id} {report.state}",
        )

    async def _unload(self, assignment: Assignment) -> None:
        """Ends a residency beside everything else, and says so once its memory is back or given up."""
        try:
            known = assignment.residency_id in self._holdings
            lost_bytes = await self._let_go(assignment.residency_id) if known else 0
            report = ResidencyReport(
                residency_id=assignment.residency_id, fence=assignment.fence, state="UNLOADED", lost_bytes=lost_bytes
            )
            await self._report(report)
        finally:
            del self._ending[assignment.residency_id]

    async def _let_go(self, residency_id: str) -> int:
        """Ends a runner, whatever it does; returns the bytes that did not come back."""
        holding = self._holdings.pop(residency_id)
        if holding.task:
            holding.task.cancel()  # At once: nobody else must begin to end its runner.
        return await self._to_the_end(self._stop(holding))

    async def _stop(self, holding: Holding) -> int:
        if holding.task:
            await asyncio.gather(holding.task, return_exceptions=True)
        return await self._end_runner(holding)

    async def _end_runner(self, holding: Holding) -> int:
        if holding.runner is None:
            return 0
        device_id = holding.assignment.device_id
        ending = self._endings.end(
            holding.runner, device_id=device_id, held_bytes=holding.held_bytes, level=holding.level
        )
        return await self._to_the_end(ending)

    async def _to_the_end(self, ending: Coroutine[Any, Any, int]) -> int:
        """Goes on with an ending though whoever waits is cancelled: nobody else knows of that runner any more."""
        task = asyncio.create_task(ending)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return await asyncio.shield(task)

    async def _end_everything(self) -> None:
        await self._builds.close()
        await self._validations.close()
        for ending in list(self._ending.values()):
            ending.cancel()
        await asyncio.gather(*self._ending.values(), return_exceptions=True)
        for residency_id in list(self._holdings):
            await self._let_go(residency_id)
        await asyncio.gather(*self._leaving, return_exceptions=True)


def _load_failed(raised: OSError, deadline: asyncio.Timeout | None) -> LoadFailed:
    if deadline and deadline.expired():
        return LoadFailed(f"Loading took longer than {LOAD_DEADLINE_S:.0f} s; look at the node's disk and log.")
    return LoadFailed(f"The model's process could not be started or broke off ({raised!r}); look at the node's log.")
