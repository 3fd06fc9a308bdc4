"""A node: loads and unloads models as the registry's desired state says, and reports the state of each residency.

The desired state is in the registry; a node only reconciles towards it and may be killed at any point. Each residency
is one runner process. While the registry is away, loaded models stay loaded and running builds go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from headrace_chassis.errors import ServiceError
from headrace_chassis.meters import Meter
from headrace_extractor.errors import (
    AlreadyExists,
    EpochStale,
    Failure,
    LoadFailed,
    NodeIdTaken,
    RegistryUnavailable,
    RunnerLost,
    WaitTimeout,
    reason_of,
)
from headrace_extractor.meters import Transfer
from headrace_extractor.node.builds import Builds
from headrace_extractor.node.ports import NodeRegistry, Runner, RunnerFactory
from headrace_extractor.node.reclaim import BACK_DEADLINE_S, Baseline, Reclaimer
from headrace_extractor.node.reporting import REPORT_INTERVAL_S, RETRY_S, try_to_tell
from headrace_extractor.node.runner_protocol import Load, Loaded, Loading
from headrace_extractor.node.validations import Validations
from headrace_extractor.node.values import Assignment, DesiredState, Device, Machine, ResidencyReport
from headrace_extractor.node.versions import library_versions

# 400 GB from a slow disk; longer is a hang.
LOAD_DEADLINE_S = 3600.0
# The registry calls a silent node lost after 15 s by default; its id is free then.
ID_WAIT_S = 60.0

logger = logging.getLogger(__name__)


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
        self._reclaimer = Reclaimer(devices, deadline_s=back_deadline_s)
        self._desired: DesiredState = DesiredState()
        self._residencies: dict[str, Residency] = {}
        self._unloads: dict[str, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[int]] = set()
        # Wakes `runner_for`: set, and replaced by a new event, at every change of `_desired` or `_residencies`.
        self._changed = asyncio.Event()
        self._builds = Builds(registry, start_runner, epoch=lambda: self.epoch, environment=environment)
        self._validations = Validations(
            registry, start_runner, devices, epoch=lambda: self.epoch, environment=environment
        )
        self.epoch = 0
        self.registered = asyncio.Event()

    async def run(self, *, address: str, on_registered: Callable[[], None] = lambda: None) -> None:
        """Registers under `address`, which clients reach, then sends heartbeats and reconciles until it is cancelled.

        Registers again whenever the registry is lost or calls the epoch stale; `on_registered` is called each time.
        Raises NodeIdTaken if another node keeps this one from registering at all.
        """
        taken_since: float | None = None
        try:
            while True:
                try:
                    await self._live_one_epoch(address, on_registered)
                except AlreadyExists as exc:  # Another node has this id. A dead one frees it within a minute.
                    taken_since = taken_since or time.monotonic()
                    if not self.epoch and time.monotonic() - taken_since > ID_WAIT_S:
                        raise NodeIdTaken(exc.message) from exc
                    logger.error("registering again: %s", exc.message)  # noqa: TRY400 -- the message says it all
                    self.registered.clear()
                    await asyncio.sleep(RETRY_S)
                except Exception as exc:
                    taken_since = None  # While the registry is away, it calls no node dead.
                    self.registered.clear()
                    usual = isinstance(exc, RegistryUnavailable | EpochStale)
                    stack = None if isinstance(exc, ServiceError) else exc
                    logger.log(logging.INFO if usual else logging.ERROR, "registering again: %s", exc, exc_info=stack)
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._builds.close()
            await self._validations.close()
            for unload in list(self._unloads.values()):
                unload.cancel()
            await asyncio.gather(*self._unloads.values(), return_exceptions=True)
            for residency_id in list(self._residencies):
                await self._let_go(residency_id)
            await asyncio.gather(*self._endings, return_exceptions=True)

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
        desired = self._desired
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    residency = self._residencies.get(residency_id)
                    if residency and residency.loaded and residency.runner:
                        return residency.runner, residency.assignment
                    # A registry that was away may grant a residency that died meanwhile. The next desired state, sent
                    # after the registry has heard of the death, is without it.
                    if not residency and self._desired is not desired and not self._desired.wants(residency_id):
                        raise RunnerLost(
                            f"Residency {residency_id} ended as it was granted; try again.", retry_after_s=RETRY_S
                        )
                    await self._changed.wait()
        except TimeoutError:
            raise WaitTimeout(
                f"Residency {residency_id} was granted but is not on this node after {deadline_s:.0f} s; try again.",
                retry_after_s=RETRY_S,
            ) from None

    async def _live_one_epoch(self, address: str, on_registered: Callable[[], None]) -> None:
        """Registers, then runs heartbeats and reconciliation until one of them fails; raises that failure."""
        self.epoch, interval_s = await self._registry.register(address, *await self._facts())
        logger.info("registered as epoch %d", self.epoch)
        self.registered.set()
        on_registered()

        async def send_heartbeats() -> None:
            while True:
                await asyncio.sleep(interval_s)
                await self._registry.heartbeat(self.epoch, *await self._facts())

        async def follow_assignments() -> None:
            async with aclosing(self._registry.assignments(self.epoch)) as states:
                async for desired in states:
                    await self._reconcile(desired)
            raise RegistryUnavailable("The registry ended the stream of assignments.", retry_after_s=RETRY_S)

        tasks = (
            asyncio.create_task(send_heartbeats(), name="heartbeat"),
            asyncio.create_task(follow_assignments(), name="assignments"),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _facts(self) -> tuple[tuple[Device, ...], Machine]:
        """Devices with their free and lost bytes, and the machine, as of now."""
        devices = await asyncio.to_thread(self._devices)
        return self._reclaimer.with_losses(devices), replace(self._machine(), runtime_bytes=self._runtime_bytes)

    async def _reconcile(self, desired: DesiredState) -> None:
        """Begins every load, unload, build and validation that the desired state asks for; waits for no load."""
        self._desired = desired
        self._notify()
        wanted = {a.residency_id: a for a in desired.assignments if a.hold}
        unwanted = {a.residency_id: a for a in desired.assignments if not a.hold}
        # The registry no longer counts the memory of a residency that it does not list, so it is ended before any load.
        for residency_id in [r for r in self._residencies if r not in wanted and r not in unwanted]:
            await self._let_go(residency_id)
        for residency_id, assignment in unwanted.items():
            if residency_id not in self._unloads:
                unload = asyncio.create_task(self._unload(assignment), name=f"unload-{residency_id}")
                self._unloads[residency_id] = unload
        for residency_id, assignment in wanted.items():
            residency = self._residencies.get(residency_id)
            if residency is None:
                residency = self._residencies[residency_id] = Residency(assignment)
                residency.task = asyncio.create_task(self._load_and_watch(residency), name=f"load-{residency_id}")
                continue
            # The runner computes with the model as it was loaded, even if the registry has changed the model since.
            residency.assignment = replace(assignment, model=residency.assignment.model)
            if residency.loaded and assignment.state != "RESIDENT":
                await self._report_resident(residency)
        self._builds.follow(desired.builds)
        self._validations.follow(desired.validations)

    async def _load_and_watch(self, residency: Residency) -> None:
        """Loads one model, waits for the end of its process and reports it as a failure."""
        deadline: asyncio.Timeout | None = None
        try:
            residency.runner = runner = await self._start_runner(environment=self._environment)
            async with asyncio.timeout(LOAD_DEADLINE_S) as deadline:
                await self._load(residency, runner)
            residency.loaded = True
            self._notify()
            await self._report_resident(residency)
            residency.baseline = await self._reclaimer.note_baseline(residency.assignment.device_id)
            await runner.wait()
            raise runner.lost()
        except (ServiceError, OSError) as raised:
            if isinstance(raised, ServiceError):
                exc = raised
            elif deadline and deadline.expired():
                exc = LoadFailed(f"Loading took longer than {LOAD_DEADLINE_S:.0f} s; look at the node's disk and log.")
            else:
                exc = LoadFailed(
                    f"The model's process could not be started or broke off ({raised!r}); look at the node's log."
                )
            logger.warning("residency %s failed: %s", residency.assignment.residency_id, exc.message)
            self._residencies.pop(residency.assignment.residency_id, None)
            self._notify()
            lost_bytes = await self._end_runner(residency)
            await self._report(
                ResidencyReport(
                    residency_id=residency.assignment.residency_id,
                    fence=residency.assignment.fence,
                    state="FAILED",
                    failure=Failure(reason=reason_of(exc), message=exc.message, metadata=exc.metadata),
                    lost_bytes=lost_bytes,
                    versions=library_versions(),
                    log_tail=residency.runner.log_tail if residency.runner else "",
                )
            )

    async def _load(self, residency: Residency, runner: Runner) -> None:
        """Has the runner load the model; reports its progress on the way."""
        assignment = residency.assignment
        command = Load(
            files_path=assignment.model.files_path,
            device=assignment.device_id,
            dtype=assignment.model.compute_dtype(assignment.device_id),
            quantization=assignment.model.quantization,
            load_options=dict(assignment.model.load_options),
            files=assignment.model.files,
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
                        fence=residency.assignment.fence,
                        state="LOADING",
                        transfer=Transfer(
                            done_bytes=event.done_bytes, total_bytes=event.total_bytes, rate_bytes_per_s=rate
                        ),
                    ),
                    attempts=1,
                )
            elif isinstance(event, Loaded):
                residency.measured_bytes = event.measured_bytes
                # All runners start with the same libraries: the first measurement holds for every runner.
                self._runtime_bytes = self._runtime_bytes or event.runtime_bytes
                self._reclaimer.note_load(assignment.device_id, event.measured_bytes)

    async def _unload(self, assignment: Assignment) -> None:
        """Ends a residency while other work goes on; reports it once its memory is back or counted as lost."""
        try:
            known = assignment.residency_id in self._residencies
            lost_bytes = await self._let_go(assignment.residency_id) if known else 0
            report = ResidencyReport(
                residency_id=assignment.residency_id, fence=assignment.fence, state="UNLOADED", lost_bytes=lost_bytes
            )
            await self._report(report)
        finally:
            del self._unloads[assignment.residency_id]

    async def _let_go(self, residency_id: str) -> int:
        """Stops loading or watching a residency and ends its runner; returns the bytes that did not come back."""
        residency = self._residencies.pop(residency_id)
        self._notify()
        if residency.task:
            residency.task.cancel()  # Before the first wait: two tasks must not begin to end the same runner.
        return await self._end_runner(residency, after=residency.task)

    async def _end_runner(self, residency: Residency, *, after: asyncio.Task[None] | None = None) -> int:
        """Ends a residency's runner once the task `after` is over; returns the bytes that did not come back.

        The work goes on though the caller is cancelled: no other task knows of that runner any more.
        """

        async def end() -> int:
            if after:
                await asyncio.gather(after, return_exceptions=True)
            if residency.runner is None:
                return 0
            return await self._reclaimer.end(
                residency.runner,
                device_id=residency.assignment.device_id,
                size_bytes=residency.size_bytes,
                baseline=residency.baseline,
            )

        ending = asyncio.create_task(end())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return await asyncio.shield(ending)

    async def _report_resident(self, residency: Residency) -> None:
        await self._report(
            ResidencyReport(
                residency_id=residency.assignment.residency_id,
                fence=residency.assignment.fence,
                state="RESIDENT",
                measured_bytes=residency.measured_bytes,
                versions=library_versions(),
                log_tail=residency.runner.log_tail if residency.runner else "",
            )
        )

    async def _report(self, report: ResidencyReport, attempts: int = 3) -> None:
        """Reports a few times at most: the registry repeats the desired state, and the node then reports again."""
        await try_to_tell(
            lambda: self._registry.report_residency(self.epoch, report),
            attempts,
            f"{report.residency_id} {report.state}",
        )

    def _notify(self) -> None:
        """Wakes every call of `runner_for`."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@dataclass(eq=False)
class Residency:
    """A residency on this node, from the start of its load to the end of its runner."""

    assignment: Assignment
    task: asyncio.Task[None] | None = None  # loads the model and watches its process
    runner: Runner | None = None
    loaded: bool = False
    measured_bytes: int = 0
    baseline: Baseline | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes of its device: as measured, but no fewer than the registry has reserved."""
        return max(self.measured_bytes, self.assignment.reserved_bytes)
