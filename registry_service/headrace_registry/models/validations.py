"""Validations: attempts to load and run a model with given options, step by step. All attempts are kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.models.models import Failure, Quantization
from headrace_registry.wakeups import POLL_S, Wakeups

log = logging.getLogger(__name__)

# Longer than the 3,900 s that nodes allow: a node's own message says more than this deadline can.
_DEADLINE_S = 4000.0
STEPS = ("dry_load", "load", "forward", "finite", "parity", "unload", "memory_back")


class AttemptKind(StrEnum):
    """A run of the test profile, or an ordinary load."""

    VALIDATION = "VALIDATION"
    LOAD = "LOAD"


class StepState(StrEnum):
    """State of a step."""

    RUNNING = "RUNNING"
    PASSED = "PASSED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the test profile."""

    name: str
    state: StepState
    message: str = ""
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt to load a model: a run of the test profile, or an ordinary load."""

    id: str
    model_id: str
    node_id: str
    device_id: str
    load_options: Mapping[str, Any]
    quantization: Quantization
    steps: tuple[Step, ...]
    done: bool
    passed: bool
    failure: Failure | None
    versions: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    kind: AttemptKind = AttemptKind.VALIDATION
    log_tail: str = ""
    notes: str = ""
    residency_id: str = ""


def passed(steps: tuple[Step, ...], failure: Failure | None) -> bool:
    """True if every step of the profile passed."""
    good = {step.name for step in steps if step.state is StepState.PASSED}
    return failure is None and good >= set(STEPS)


def closed(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Returns the steps of an attempt that broke off: a step that was running has failed."""
    return tuple(
        Step(name=step.name, state=StepState.FAILED, message=step.message or "broke off", seconds=step.seconds)
        if step.state is StepState.RUNNING
        else step
        for step in steps
    )


def news(before: tuple[Step, ...], after: tuple[Step, ...]) -> tuple[Step, ...]:
    """Returns the steps of `after` that changed since `before`, in order."""
    known = {step.name: step for step in before}
    return tuple(step for step in after if known.get(step.name) != step)


class AttemptStore(Protocol):
    """The part of the store that watching an attempt needs."""

    async def follow(self, attempt_id: str) -> Attempt:
        """Reads the attempt and marks it as watched. Raises StateConflict if it was deleted."""
        ...

    async def stop(self, attempt_id: str, failure: Failure) -> None:
        """Ends the attempt with a failure; an attempt that is over stays as it is."""
        ...


async def watch_attempt(store: AttemptStore, wakeups: Wakeups, attempt: Attempt) -> AsyncGenerator[Attempt, None]:
    """Yields the attempt after each change of its steps, last when it is done. Closing the generator ends it."""
    deadline = time.monotonic() + _DEADLINE_S
    seen_steps: tuple[Step, ...] = ()
    try:
        while True:
            seen = wakeups.generation
            attempt = await store.follow(attempt.id)
            if attempt.done:
                yield attempt
                return
            if attempt.steps != seen_steps:  # Other columns change too, each time the attempt is marked as watched.
                seen_steps = attempt.steps
                yield attempt
            if time.monotonic() > deadline:
                late = Failure(reason="WAIT_TIMEOUT", message="the node did not finish in time; look at its log")
                await store.stop(attempt.id, late)
            await wakeups.wait(seen, timeout_s=POLL_S)
    finally:
        if not attempt.done:
            stopped = Failure(reason="STATE_CONFLICT", message="the call that asked for it ended before it was done")
            try:
                # Shielded: the cancellation that ends the call must not keep the node at work.
                await asyncio.shield(asyncio.ensure_future(store.stop(attempt.id, stopped)))
            except DatabaseUnavailable:
                log.warning("attempt %s could not be ended; it runs out by itself", attempt.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """A node's report on an attempt, with all its steps so far."""

    node_id: str
    epoch: int
    attempt_id: str
    steps: tuple[Step, ...]
    done: bool
    failure: Failure | None
    versions: Mapping[str, str]
