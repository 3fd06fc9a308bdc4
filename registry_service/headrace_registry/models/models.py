"""Models: what is registered, where its files come from and how far they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class ModelState(StrEnum):
    """Where a model's files stand; a name ending in -ING resolves by itself."""

    REGISTERED = "REGISTERED"
    DOWNLOADING = "DOWNLOADING"
    CONVERTING = "CONVERTING"
    QUANTIZING = "QUANTIZING"
    READY = "READY"
    FAILED = "FAILED"

    @property
    def preparing(self) -> bool:
        """True while a preparation is at work."""
        return self in (ModelState.DOWNLOADING, ModelState.CONVERTING, ModelState.QUANTIZING)


class Quantization(StrEnum):
    """Quantization of the weights on the device."""

    NONE = "NONE"
    INT8 = "INT8"
    INT4 = "INT4"
    INT2 = "INT2"


class SourceKind(StrEnum):
    """The three places files come from."""

    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where files come from: `location` is a repo id or an absolute path, `revision` belongs to hub repos."""

    kind: SourceKind
    location: str
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far long work that moves bytes has come; zero means unknown, `eta_s` is negative then."""

    done_bytes: int = 0
    total_bytes: int = 0
    percent: float = 0.0
    rate_bytes_per_s: float = 0.0
    eta_s: float = -1.0

    @staticmethod
    def of(*, done_bytes: int, total_bytes: int, rate_bytes_per_s: float = 0.0) -> Transfer:
        """Fills in percent and ETA."""
        left = max(0, total_bytes - done_bytes)
        return Transfer(
            done_bytes=done_bytes,
            total_bytes=total_bytes,
            percent=min(100.0, 100.0 * done_bytes / total_bytes) if total_bytes else 0.0,
            rate_bytes_per_s=rate_bytes_per_s,
            eta_s=left / rate_bytes_per_s if total_bytes and rate_bytes_per_s > 0 else -1.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why long work ended badly; `reason` is an ErrorReason without its prefix."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What `config.json` says of the network; zero or empty where it says nothing."""

    model_type: str = ""
    class_name: str = ""
    n_layers: int = 0
    d_model: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    vocab_size: int = 0
    context_window: int = 0
    tied_embeddings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """How far the residual stream behind a layer is from the unquantized model's, over all positions."""

    layer: int
    cosine: float
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What quantization changed, on a fixed text."""

    reference_dtype: str
    n_tokens: int
    layers: tuple[LayerFidelity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One registered (source, commit, quantization, load options)."""

    id: str
    source: Source
    create_time: datetime
    update_time: datetime
    commit_sha: str = ""
    quantization: Quantization = Quantization.NONE
    load_options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    state: ModelState = ModelState.REGISTERED
    failure: Failure | None = None
    transfer: Transfer | None = None
    architecture: Architecture | None = None
    n_parameters: int = 0
    weight_bytes: int = 0
    parameters_by_dtype: Mapping[str, int] = field(default_factory=dict)
    files_path: str = ""
    tokenizer_digest: str = ""
    store_bytes: int = 0
    fidelity: Fidelity | None = None
    last_used_time: datetime | None = None
    revision: int = 1
    event_seq: int = 0

    @property
    def etag(self) -> str:
        """An opaque tag that changes with every change."""
        return f'"{self.revision:x}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """What RegisterModel is asked for; `id` may be empty, `commit_sha` too while the hub has not told it."""

    id: str
    source: Source
    commit_sha: str = ""
    quantization: Quantization = Quantization.NONE
    load_options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def identity(self) -> str:
        """Two registrations with the same identity are the same model."""
        parts = [self.source.kind, self.source.location, self.source.revision, self.quantization]
        return json.dumps([*map(str, parts), dict(self.load_options)], sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvent:
    """One event of WatchModel: the model after it."""

    seq: int
    time: datetime
    model: Model
    message: str = ""
