"""Validations: each tries a model on one of this node's devices, step by step, in a runner of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import Failure, LoadFailed, StateConflict, reason_of
from headrace_extractor.models import compute_dtype
from headrace_extractor.node.devices import free_bytes
from headrace_extractor.node.ports import NodeRegistry, RunnerFactory
from headrace_extractor.node.reporting import try_to_tell
from headrace_extractor.node.runner_protocol import Step, Validate, Validated
from headrace_extractor.node.values import Device, Validation, ValidationReport

# The hour that a load may take, and five minutes for the two forward passes.
_DEADLINE_S = 3900.0
# A driver gives memory back a moment after the process is gone.
_MEMORY_DEADLINE_S = 15.0
_LOOK_EVERY_S = 0.2
# So much less than before may be free: other processes on the device come and go.
_TOLERANCE_BYTES = 64 * 1024 * 1024


class Validations:
    """Carries out the validations that the registry wants, and stops a validation that it wants no more."""

    def __init__(
        self,
        registry: NodeRegistry,
        start_runner: RunnerFactory,
        devices: Callable[[], Sequence[Device]],
        *,
        epoch: Callable[[], int],
        environment: Mapping[str, str],
    ) -> None:
        self._registry = registry
        self._start_runner = start_runner
        self._devices = devices
        self._epoch = epoch
        self._environment = environment
        self._running: dict[str, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    def follow(self, wanted: Sequence[Validation]) -> None:
        """Starts the wanted validations that are new, and ends the running ones that are not wanted any more."""
        ids = {validation.attempt_id for validation in wanted}
        for attempt_id in [each for each in self._running if each not in ids]:
            task = self._running.pop(attempt_id)
            if not task.done():
                ending = asyncio.create_task(self._end(attempt_id, task), name=f"end-{attempt_id}")
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)
        for validation in wanted:
            if validation.attempt_id not in self._running:
                task = asyncio.create_task(self._validate(validation), name=f"validate-{validation.attempt_id}")
                self._running[validation.attempt_id] = task

    async def close(self) -> None:
        """Ends all validations and their runners; their memory goes with this node's epoch."""
        tasks = [*self._running.values(), *self._endings]
        for task in self._running.values():
            task.cancel()
        self._running.clear()
        for ending in self._endings:
            ending.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self, attempt_id: str, task: asyncio.Task[None]) -> None:
        """Ends a validation, then tells the registry that its memory is free: until then its bytes count there."""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stopped = Failure(reason=StateConflict.reason, message="it was not wanted any more")
        report = ValidationReport(attempt_id=attempt_id, steps=(), done=True, failure=stopped, versions={})
        await try_to_tell(
            lambda: self._registry.report_validation(self._epoch(), report), 5, f"the end of validation {attempt_id}"
        )

    async def _validate(self, validation: Validation) -> None:
        """Runs all steps; stays in `_running` afterwards, until the registry has taken it off its list."""
        attempt = _Attempt(validation=validation)
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await self._run(attempt)
        except (ServiceError, TimeoutError, OSError) as raised:
            exc = raised if isinstance(raised, ServiceError) else LoadFailed(f"The validation broke off: {raised!r}.")
            attempt.failure = attempt.failure or Failure(reason=reason_of(exc), message=exc.message)
        await self._tell(attempt, done=True)

    async def _run(self, attempt: _Attempt) -> None:
        validation, model = attempt.validation, attempt.validation.model
        free_before = await free_bytes(self._devices, validation.device_id)
        runner = await self._start_runner(environment=self._environment)
        try:
            command = Validate(
                files_path=model.files_path,
                device=validation.device_id,
                dtype=compute_dtype(validation.load_options, validation.device_id),
                quantization=model.quantization,
                load_options=dict(validation.load_options),
                files=model.files,
            )
            async for event in runner.run(command, ends=(Validated,)):
                if isinstance(event, Step):
                    attempt.note(event)
                    await self._tell(attempt, done=False)
                elif isinstance(event, Validated):
                    attempt.versions = event.versions
            await self._begin(attempt, "unload")
            started = time.monotonic()
            await runner.kill()
            seconds = time.monotonic() - started
            attempt.note(Step(name="unload", state="PASSED", message="its process is gone", seconds=seconds))
        finally:
            await runner.kill()
        await self._check_memory(attempt, free_before)

    async def _check_memory(self, attempt: _Attempt, free_before: int) -> None:
        """Checks that a GPU has its memory back, and asks its driver until it says so.

        Always passes on a CPU: the system has all memory of a process that is gone.
        """
        await self._begin(attempt, "memory_back")
        started = time.monotonic()
        device_id = attempt.validation.device_id
        free_after = await free_bytes(self._devices, device_id)
        if device_id.startswith("cuda"):
            while free_after + _TOLERANCE_BYTES < free_before and time.monotonic() - started < _MEMORY_DEADLINE_S:
                await asyncio.sleep(_LOOK_EVERY_S)
                free_after = await free_bytes(self._devices, device_id)
        missing = free_before - free_after
        back = not device_id.startswith("cuda") or missing <= _TOLERANCE_BYTES
        attempt.note(
            Step(
                name="memory_back",
                state="PASSED" if back else "FAILED",
                message="" if back else f"{missing} bytes of {device_id} did not come back; look for other processes",
                seconds=time.monotonic() - started,
                figures={"free_before_bytes": float(free_before), "free_after_bytes": float(free_after)},
            )
        )

    async def _begin(self, attempt: _Attempt, name: str) -> None:
        attempt.note(Step(name=name, state="RUNNING"))
        await self._tell(attempt, done=False)

    async def _tell(self, attempt: _Attempt, *, done: bool) -> None:
        report = attempt.report(done=done)
        await try_to_tell(
            lambda: self._registry.report_validation(self._epoch(), report),
            5 if done else 1,
            f"validation {attempt.validation.attempt_id}",
        )


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One validation under way, with its steps so far."""

    validation: Validation
    steps: dict[str, Step] = field(default_factory=dict)
    failure: Failure | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def note(self, step: Step) -> None:
        """Notes the latest state of a step; the first failed step becomes the failure of the attempt."""
        self.steps[step.name] = step
        if step.state == "FAILED" and self.failure is None:
            self.failure = Failure(reason=step.reason or LoadFailed.reason, message=f"{step.name}: {step.message}")

    def report(self, *, done: bool) -> ValidationReport:
        """Returns the report for the registry."""
        return ValidationReport(
            attempt_id=self.validation.attempt_id,
            steps=tuple(self.steps.values()),
            done=done,
            failure=self.failure,
            versions=self.versions,
        )
