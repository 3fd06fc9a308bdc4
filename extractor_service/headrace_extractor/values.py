"""The extractor's nouns as plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from headrace_extractor.receipt import ParityReceipt
from headrace_extractor.recipe import Recipe
from headrace_extractor.runner_protocol import Step
from headrace_log.layout import PROVENANCE, Dtype, scale_column

_ORIGINS = tuple(column.name for column in PROVENANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far a piece of work that moves bytes has come."""

    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0

    @property
    def percent(self) -> float:
        """0 to 100; 0 while the total is unknown."""
        return 100.0 * self.done_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds left at the present rate; negative while unknown."""
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_per_s if self.rate_bytes_per_s else -1.0


class TransferMeter:
    """Makes `Transfer` values with a rate over the time since it was made."""

    def __init__(self, now: float) -> None:
        self._start = now

    def at(self, done_bytes: int, total_bytes: int, now: float) -> Transfer:
        """The transfer as of `now`."""
        elapsed = now - self._start
        rate = done_bytes / elapsed if elapsed > 0 else 0.0
        return Transfer(done_bytes=done_bytes, total_bytes=total_bytes, rate_bytes_per_s=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the extractor needs to know of a registered model."""

    id: str
    source: str  # `hub:owner/name`, `folder`, `gguf`
    commit_sha: str
    quantization: str
    load_options: Mapping[str, Any]
    ready: bool
    model_type: str
    n_layers: int
    d_model: int
    context_window: int
    weight_bytes: int
    files_path: str
    tokenizer_digest: str
    gguf_path: str = ""

    def compute_dtype(self, device_id: str) -> str:
        """Dtype of the forward pass: the load option, else float32 on a CPU and bfloat16 on a GPU."""
        default = "float32" if device_id == "cpu" else "bfloat16"
        return str(self.load_options.get("dtype", default))


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU of this node, or its CPU."""

    id: str
    kind: str  # `cpu`, `cuda`, `mps`
    name: str
    capacity_bytes: int
    free_bytes: int
    total_bytes: int = 0
    lost_bytes: int = 0  # What unloads did not give back.
    capability: str = ""  # Of a CUDA device, such as `9.0`.
    flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this node is beside its devices. Bytes; 0 while unknown. Limits: 0 for none."""

    memory_bytes: int = 0
    memory_free_bytes: int = 0
    runtime_bytes: int = 0  # A runner's before it holds weights.
    max_loads: int = 0
    max_residents: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A residency this node shall hold (`hold`) or end."""

    residency_id: str
    fence: int
    device_id: str
    hold: bool
    state: str  # the registry's view, such as `LOADING`
    model: ModelInfo
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Model files this node shall make."""

    model: ModelInfo
    target_path: str
    source_path: str = ""  # unquantized files to quantize; empty for a conversion


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A model to try on a device of this node, with the options that `model` carries."""

    attempt_id: str
    model: ModelInfo
    device_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """How a validation stands: all its steps so far."""

    attempt_id: str
    steps: tuple[Step, ...]
    done: bool
    failure: Failure | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """All a node shall hold and make."""

    assignments: tuple[Assignment, ...] = ()
    builds: tuple[Build, ...] = ()
    validations: tuple[Validation, ...] = ()

    def holds(self, residency_id: str) -> bool:
        """True if the node shall hold that residency."""
        return any(each.hold and each.residency_id == residency_id for each in self.assignments)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyReport:
    """How a residency stands, as the node sees it."""

    residency_id: str
    fence: int
    state: str  # `LOADING`, `RESIDENT`, `UNLOADED`, `FAILED`
    transfer: Transfer | None = None
    measured_bytes: int = 0
    failure: Failure | None = None
    lost_bytes: int = 0  # What its device did not get back, once it is over.


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A reader's right that a residency stays."""

    id: str
    fence: int
    residency_id: str
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why work ended badly; `reason` is an ErrorReason without prefix."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Inverse of the constructor."""
        return {"reason": self.reason, "message": self.message, "metadata": dict(self.metadata)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long rows stay; `window_bytes` and `reader_grace_s` are for `window`."""

    kind: str = "retain"
    window_bytes: int = 256 * 1024 * 1024
    reader_grace_s: float = 60.0

    @property
    def is_window(self) -> bool:
        """True when the forward pass waits for readers."""
        return self.kind == "window"

    def to_json(self) -> dict[str, Any]:
        """Inverse of the constructor."""
        return {"kind": self.kind, "window_bytes": self.window_bytes, "reader_grace_s": self.reader_grace_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionSpec:
    """What to extract, defaults filled in, hookpoints in forward order."""

    model_id: str
    corpus_id: str
    hookpoints: tuple[str, ...]
    recipe: Recipe
    retention: Retention = field(default_factory=Retention)
    max_rows: int = 0
    allow_non_finite: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of its rows: provenance, then its hookpoints, and behind an 8-bit one its scales."""
        if Dtype(self.recipe.storage_dtype).itemsize > 1:
            return (*_ORIGINS, *self.hookpoints)
        return (*_ORIGINS, *(name for point in self.hookpoints for name in (point, scale_column(point))))

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return {
            "model_id": self.model_id,
            "corpus_id": self.corpus_id,
            "hookpoints": list(self.hookpoints),
            "recipe": self.recipe.to_json(),
            "retention": self.retention.to_json(),
            "max_rows": self.max_rows,
            "allow_non_finite": self.allow_non_finite,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ExtractionSpec:
        """Reads what `to_json` wrote."""
        return cls(
            model_id=document["model_id"],
            corpus_id=document["corpus_id"],
            hookpoints=tuple(document["hookpoints"]),
            recipe=Recipe.from_json(document["recipe"]),
            retention=Retention(**document["retention"]),
            max_rows=document["max_rows"],
            allow_non_finite=document["allow_non_finite"],
        )


class ExtractionState(StrEnum):
    """Where an extraction stands; DESIGN's contract spells out what each means."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RUNNING = "RUNNING"
    WAITING = "WAITING"
    RECOVERING = "RECOVERING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """True when no more rows will come."""
        return self in (ExtractionState.DONE, ExtractionState.FAILED, ExtractionState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderStatus:
    """An attached reader, and the row before which it has released everything."""

    reader: str
    next_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """An extraction at one moment."""

    id: str
    spec: ExtractionSpec
    set_id: str
    path: str
    state: ExtractionState = ExtractionState.QUEUED
    failure: Failure | None = None
    n_rows: int = 0
    n_rows_expected: int = 0
    n_rows_exact: bool = False
    n_rows_computed: int = 0
    rows_per_s: float = 0.0
    size_bytes: int = 0
    transfer: Transfer | None = None
    queue_position: int = 0
    waiting_for: tuple[ReaderStatus, ...] = ()
    readers: tuple[ReaderStatus, ...] = ()
    cached: bool = False
    create_time: float = field(default_factory=time.time)
    update_time: float = field(default_factory=time.time)
    n_non_finite: int = 0
    receipt: ParityReceipt | None = None

    @property
    def eta_s(self) -> float:
        """Seconds left at the present rate; negative while unknown."""
        if self.state.ended:
            return 0.0
        if not self.rows_per_s or not self.n_rows_expected:
            return -1.0
        return max(self.n_rows_expected - self.n_rows, 0) / self.rows_per_s
