"""Models, as the registry knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from headrace_client.values.common import Failure, Transfer
from headrace_client.values.listing import Shown


class ModelState(StrEnum):
    """The state of a model's files."""

    REGISTERED = "REGISTERED"
    DOWNLOADING = "DOWNLOADING"
    CONVERTING = "CONVERTING"
    QUANTIZING = "QUANTIZING"
    READY = "READY"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"


class Quantization(StrEnum):
    """Quantization of the weights on the device."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @classmethod
    def _missing_(cls, value: object) -> Quantization | None:
        """Accepts any case, and the names by bits: FP16, Q8, Q4, Q2."""
        name = str(value).lower()
        by_bits = {"fp32": "none", "bf16": "none", "fp16": "none", "q8": "int8", "q4": "int4", "q2": "int2"}
        return next((member for member in cls if member.value == by_bits.get(name, name)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files come from: `kind` is `hub`, `folder` or `gguf`, `location` a repo or a path."""

    kind: str
    location: str
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The network by its `config.json`; zero or empty where that says nothing."""

    model_type: str
    class_name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    context_window: int
    tied_embeddings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the authors of a model say of it: its licence, and the dtype it was published for; empty if they do not."""

    license: str = ""
    license_link: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """How far the residual stream behind a layer is from the unquantized model's, over all positions.

    `cosine` is the mean over positions, `relative_error` the norm of the difference by the norm of the reference.
    """

    layer: int
    cosine: float
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """A quantized model compared with the unquantized one in `reference_dtype`, on a fixed text of `n_tokens`."""

    reference_dtype: str
    n_tokens: int
    layers: tuple[LayerFidelity, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Model(Shown):
    """One registered (source, commit, quantization, load options)."""

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "state", "quantization", "n_parameters", "weight_bytes")

    id: str
    source: ModelSource
    state: ModelState
    commit_sha: str = ""
    quantization: Quantization = Quantization.NONE
    load_options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    transfer: Transfer | None = None
    architecture: Architecture | None = None
    n_parameters: int = 0
    weight_bytes: int = 0
    parameters_by_dtype: Mapping[str, int] = field(default_factory=dict)
    files_path: str = ""
    tokenizer_digest: str = ""
    etag: str = ""
    create_time: datetime | None = None
    update_time: datetime | None = None
    store_bytes: int = 0
    fidelity: Fidelity | None = None
    card: ModelCard | None = None
    last_used_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LoadOption(Shown):
    """A key of `load_options`, its values and default in words; `changes_numbers` if activations depend on it."""

    SHOWN: ClassVar[tuple[str, ...]] = ("name", "values", "default")

    name: str
    values: str
    default: str
    about: str
    changes_numbers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvent:
    """One event of a model; the first after each connection is a snapshot."""

    seq: int
    model: Model
    message: str = ""
    snapshot: bool = False
    time: datetime | None = None
