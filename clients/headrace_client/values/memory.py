"""The memory of a model in each form, devices where it fits, and the catalog of curated models. Sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from headrace_client.values.listing import Shown
from headrace_client.values.models import Quantization


class Fit(StrEnum):
    """Whether a model has room on a device."""

    RESIDENT = "RESIDENT"
    FREE = "FREE"
    AFTER_EVICTION = "AFTER_EVICTION"
    BUSY = "BUSY"
    NEVER = "NEVER"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Loading a model on one device; `max_batch_size` is for the context size and hookpoints of the workload."""

    node_id: str
    device_id: str
    fit: Fit
    required_bytes: int
    evicted_model_ids: tuple[str, ...]
    max_batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """A model in one form: its quantization, and the dtype of unquantized weights.

    `overhead_bytes` is the sum of `runtime_bytes`, an empty runner, and `workload_bytes`, the activations of a forward
    pass. `measured`: weights and runtime were measured by a load. `placements` are sorted, the best first.
    """

    quantization: Quantization
    dtype: str
    weight_bytes: int
    overhead_bytes: int
    runtime_bytes: int
    workload_bytes: int
    total_bytes: int
    measured: bool
    fits_on: tuple[str, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAdvice:
    """A model in every form; `recommended` is the most exact form with room somewhere, None if no form has room."""

    estimates: tuple[MemoryEstimate, ...]
    recommended: MemoryEstimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogMemory:
    """Memory of a curated model at rest, in one form."""

    quantization: Quantization
    dtype: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogBatch:
    """The largest batch for a size of memory at 1024 tokens and one hookpoint, and the form that allows it."""

    memory_bytes: int
    batch_size: int
    quantization: Quantization


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CatalogEntry(Shown):
    """One curated model."""

    SHOWN: ClassVar[tuple[str, ...]] = ("name", "repo_id", "n_parameters", "n_layers", "d_model")

    name: str
    repo_id: str
    model_type: str
    n_parameters: int
    n_layers: int
    d_model: int
    context_window: int
    probe_layers: tuple[int, ...]
    categories: tuple[str, ...]
    gated: bool
    memory: tuple[CatalogMemory, ...]
    batches: tuple[CatalogBatch, ...]
