"""Models as they are registered: source, state of the files, numbers read from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from headrace_models.folder import FileStamp


class ModelState(StrEnum):
    """State of a model's files. A state with a name in -ING ends by itself."""

    REGISTERED = "REGISTERED"
    DOWNLOADING = "DOWNLOADING"
    CONVERTING = "CONVERTING"
    QUANTIZING = "QUANTIZING"
    READY = "READY"
    FAILED = "FAILED"

    @property
    def preparing(self) -> bool:
        """True while the model has a preparation."""
        return self in (ModelState.DOWNLOADING, ModelState.CONVERTING, ModelState.QUANTIZING)


class Quantization(StrEnum):
    """Quantization of the weights, on the disk and on the device."""

    NONE = "NONE"
    INT8 = "INT8"
    INT4 = "INT4"
    INT2 = "INT2"


class SourceKind(StrEnum):
    """The three kinds of sources."""

    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Source of a model's files: `location` is a repo id or an absolute path; only a hub repo has a `revision`."""

    kind: SourceKind
    location: str
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Progress of long work that moves bytes. Zero means unknown; an unknown `eta_s` is negative."""

    done_bytes: int = 0
    total_bytes: int = 0
    percent: float = 0.0
    rate_bytes_per_s: float = 0.0
    eta_s: float = -1.0

    @staticmethod
    def of(*, done_bytes: int, total_bytes: int, rate_bytes_per_s: float = 0.0) -> Transfer:
        """Returns the progress with percent and ETA computed."""
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
    """Why long work failed; `reason` is an ErrorReason without its prefix."""

    reason: str
    message: str
    # The process was ended from outside. Known in a node's report alone, and never stored.
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The network's numbers from `config.json`; zero or empty if the file lacks them."""

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
class ModelCard:
    """What the authors of a model say of it; empty if they do not."""

    license: str = ""
    license_link: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """Distance of the residual stream after one layer from the unquantized model's, over all positions."""

    layer: int
    cosine: float
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Distance of a quantized model from the unquantized one, layer by layer, measured on a fixed text."""

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
    card: ModelCard | None = None
    last_used_time: datetime | None = None
    revision: int = 1
    event_seq: int = 0
    files: tuple[FileStamp, ...] = ()  # Read only for GetModel and for nodes.

    @property
    def etag(self) -> str:
        """An opaque tag that changes with every change."""
        return f'"{self.revision:x}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The files of a model as they were when it became READY.

    `source_files` are a GGUF file or its parts, or the registered folder's where `path` is another folder.
    """

    path: str
    files: tuple[FileStamp, ...]
    source_files: tuple[FileStamp, ...] = ()
    distrusted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """A request to register a model. `id` may be empty, and so may `commit_sha` until the hub resolves it."""

    id: str
    source: Source
    commit_sha: str = ""
    quantization: Quantization = Quantization.NONE
    load_options: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def identity(self) -> str:
        """A text that is equal for two registrations of the same model. It leaves out the commit, resolved later."""
        parts = [self.source.kind, self.source.location, self.source.revision, self.quantization]
        return json.dumps([*map(str, parts), dict(self.load_options)], sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvent:
    """One event of WatchModel, with the model as it stands after the event."""

    seq: int
    time: datetime
    model: Model
    message: str = ""
