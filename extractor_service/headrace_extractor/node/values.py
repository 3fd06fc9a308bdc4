"""A node, its devices, and the work that the registry assigns to it, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from headrace_extractor.errors import Failure
from headrace_extractor.meters import Transfer
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.runner_protocol import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU of this node, or its CPU."""

    id: str
    kind: str  # `cpu`, `cuda`, `mps`
    name: str
    capacity_bytes: int
    free_bytes: int
    total_bytes: int = 0
    lost_bytes: int = 0  # bytes that did not come back after unloads
    capability: str = ""  # of a CUDA device, such as `9.0`
    flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Main memory and limits of this node. Bytes are 0 while unknown, limits 0 for none."""

    memory_bytes: int = 0
    memory_free_bytes: int = 0
    runtime_bytes: int = 0  # memory of a runner before it loads weights
    max_loads: int = 0
    max_residents: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A residency that this node shall keep loaded (`hold`) or end."""

    residency_id: str
    fence: int
    device_id: str
    hold: bool
    state: str  # in the registry, such as `LOADING`
    model: ModelInfo
    reserved_bytes: int = 0


class BuildKind(StrEnum):
    """The kinds of builds, by the files that a build starts from."""

    CONVERT_GGUF = "CONVERT_GGUF"  # From the model's GGUF file.
    CONVERT_PICKLED = "CONVERT_PICKLED"  # From a folder of pickled weights.
    CONVERT_TOKENIZER = "CONVERT_TOKENIZER"  # From a folder with its tokenizer in an older form.
    QUANTIZE = "QUANTIZE"  # From a folder of unquantized weights.


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Model files this node shall make."""

    kind: BuildKind | None  # None: a kind that this version does not know.
    model: ModelInfo
    target_path: str
    source_path: str = ""  # Empty for CONVERT_GGUF.


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A model to try on a device of this node, with load options that may differ from the model's own."""

    attempt_id: str
    model: ModelInfo
    device_id: str
    load_options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The state of a validation, with all its steps so far."""

    attempt_id: str
    steps: tuple[Step, ...]
    done: bool
    failure: Failure | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """Everything the registry wants of a node: residencies, builds and validations."""

    assignments: tuple[Assignment, ...] = ()
    builds: tuple[Build, ...] = ()
    validations: tuple[Validation, ...] = ()

    def wants(self, residency_id: str) -> bool:
        """True if the node shall keep that residency loaded."""
        return any(each.hold and each.residency_id == residency_id for each in self.assignments)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyReport:
    """The state of a residency on its node."""

    residency_id: str
    fence: int
    state: str  # `LOADING`, `RESIDENT`, `UNLOADED`, `FAILED`
    transfer: Transfer | None = None
    measured_bytes: int = 0
    failure: Failure | None = None
    lost_bytes: int = 0  # of its device, which did not get them back after the end
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries that loaded the model
    log_tail: str = ""  # what the model's process wrote last


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right that a residency stays loaded until the lease expires, `ttl_s` after its last renewal."""

    id: str
    fence: int
    residency_id: str
    ttl_s: float
