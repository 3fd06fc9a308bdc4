"""Attempts to validate a model: the load options, the versions, and how each step ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from headrace_client.values.common import Failure
from headrace_client.values.listing import Shown
from headrace_client.values.models import Quantization


class AttemptKind(StrEnum):
    """A run of the test profile, or an ordinary load."""

    VALIDATION = "VALIDATION"
    LOAD = "LOAD"


class StepState(StrEnum):
    """The state of a step."""

    RUNNING = "RUNNING"
    PASSED = "PASSED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationStep:
    """One step: `dry_load`, `load`, `forward`, `finite`, `parity`, `unload` or `memory_back`."""

    name: str
    state: StepState
    message: str = ""
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ValidationAttempt(Shown):
    """One attempt to load a model, `passed` if it is done and no step failed.

    A LOAD for a lease, a pin or `load` has the step `load` only. `log_tail` is what the model's process wrote last.
    """

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "kind", "model_id", "node_id", "device_id", "passed")

    id: str
    model_id: str
    node_id: str
    device_id: str
    quantization: Quantization
    load_options: Mapping[str, Any]
    steps: tuple[ValidationStep, ...]
    done: bool
    passed: bool
    failure: Failure | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    create_time: datetime | None = None
    update_time: datetime | None = None
    kind: AttemptKind = AttemptKind.VALIDATION
    log_tail: str = ""
    notes: str = ""
    residency_id: str = ""
