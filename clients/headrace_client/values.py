"""What the client takes and gives: frozen values, without gRPC and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from headrace_client.errors import InvalidArgument
from headrace_client.fidelity import Fidelity
from headrace_client.receipts import ParityReceipt
from headrace_client.waits import Bottleneck, bottleneck
from headrace_client.windows import LongDocuments, TokenWindow

PROVENANCE_COLUMNS = ("token_id", "document", "position")
_MIB = 1024 * 1024
_E = TypeVar("_E", bound=StrEnum)


class ModelState(StrEnum):
    """Where a model's files stand."""

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
        """Takes any case, and the names by bits: FP16, Q8, Q4, Q2."""
        name = str(value).lower()
        by_bits = {"fp32": "none", "bf16": "none", "fp16": "none", "q8": "int8", "q4": "int4", "q2": "int2"}
        return next((member for member in cls if member.value == by_bits.get(name, name)), None)


class ResidencyState(StrEnum):
    """Where one model on one device stands."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RESIDENT = "RESIDENT"
    DRAINING = "DRAINING"
    UNLOADING = "UNLOADING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"


class NodeState(StrEnum):
    """Whether the registry hears from a node."""

    ALIVE = "ALIVE"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"


class ExtractionState(StrEnum):
    """Where an extraction stands."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RUNNING = "RUNNING"
    WAITING = "WAITING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    RECOVERING = "RECOVERING"
    UNKNOWN = "UNKNOWN"


class Packing(StrEnum):
    """How documents fill sequences."""

    PACKED = "packed"
    ONE_DOCUMENT = "one_document"


class TokenPolicy(StrEnum):
    """Where the beginning- or end-of-sequence token goes."""

    DOCUMENT = "document"
    NONE = "none"


class Dtype(StrEnum):
    """Element type of a column."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT32 = "int32"
    FLOAT8_E4M3 = "float8_e4m3"
    INT8 = "int8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}.get(self.value, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far a piece of work that moves bytes has come. None where the server does not know."""

    done_bytes: int
    total_bytes: int | None
    percent: float | None
    rate_bytes_per_s: float | None
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why long work ended badly."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files come from: `kind` is `hub`, `folder` or `gguf`, `location` a repo or a path."""

    kind: str
    location: str
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What `config.json` says of the network; zero or empty where it says nothing."""

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
class Model:
    """One registered (source, commit, quantization, load options)."""

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
    last_used_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvent:
    """One event of a model; the first after each connection is a snapshot."""

    seq: int
    model: Model
    message: str = ""
    snapshot: bool = False
    time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU of a node, or its CPU; sizes in bytes."""

    id: str
    kind: str
    name: str
    capacity_bytes: int
    reserved_bytes: int
    free_bytes: int
    total_bytes: int = 0
    lost_bytes: int = 0
    capability: str = ""
    flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine running one extractor. Bytes are 0 while unknown; limits of 0 are none."""

    id: str
    address: str
    epoch: int
    state: NodeState
    devices: tuple[Device, ...]
    version: str = ""
    heartbeat_time: datetime | None = None
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    runtime_bytes: int = 0
    max_loads: int = 0
    max_residents: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """One model on one device of one node."""

    id: str
    model_id: str
    node_id: str
    device_id: str
    state: ResidencyState
    reserved_bytes: int
    measured_bytes: int
    n_leases: int
    reason: str = ""
    actor: str = ""
    transfer: Transfer | None = None
    failure: Failure | None = None
    create_time: datetime | None = None
    update_time: datetime | None = None
    last_used_time: datetime | None = None
    queue_position: int = 0
    pinned: bool = False
    holders: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """True once nothing more happens to it."""
        return self.state in (ResidencyState.UNLOADED, ResidencyState.FAILED, ResidencyState.LOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyEvent:
    """A residency as it was after something happened to it.

    With `snapshot` it tells what is there: at the beginning, and again where events were missed for good. A snapshot's
    events but the last have `seq` 0: a watch that goes on from there is sent all of it again.
    """

    seq: int
    residency: Residency
    snapshot: bool = False
    time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Somebody's wish that a model stays where it is resident, on one node or on any (an empty `node_id`)."""

    model_id: str
    owner: str
    node_id: str = ""
    reason: str = ""
    expire_time: datetime | None = None
    create_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """An ingested source of documents."""

    id: str
    digest: str
    n_documents: int
    size_bytes: int
    tokenized: bool
    origin: str = ""
    create_time: datetime | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How documents become rows; all of it is part of a set's identity.

    `context_size` 2 to 131072 tokens, `batch_size` 1 to 1024 sequences a forward pass, `storage_dtype` a float dtype,
    or INT8 or FLOAT8_E4M3 with a float32 scale a row.
    `long_documents` is by default SPLIT where documents are packed and TRUNCATE where they are not; `window` may be
    given as `(start, end)`.
    """

    context_size: int = 256
    packing: Packing = Packing.PACKED
    attend_across_documents: bool = False
    bos: TokenPolicy = TokenPolicy.DOCUMENT
    eos: TokenPolicy = TokenPolicy.NONE
    drop_special_tokens: bool = False
    drop_first_positions: int = 0
    batch_size: int = 4
    storage_dtype: Dtype = Dtype.FLOAT32
    long_documents: LongDocuments | None = None
    window: TokenWindow | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        # Plain strings are taken too: Recipe(packing="one_document").
        for name, kind in (("packing", Packing), ("bos", TokenPolicy), ("eos", TokenPolicy), ("storage_dtype", Dtype)):
            object.__setattr__(self, name, choice(kind, getattr(self, name), name))
        default = LongDocuments.SPLIT if self.packing == Packing.PACKED else LongDocuments.TRUNCATE
        long_documents = choice(LongDocuments, self.long_documents or default, "long_documents")
        object.__setattr__(self, "long_documents", long_documents)
        if isinstance(self.window, tuple):
            object.__setattr__(self, "window", TokenWindow(*self.window))


@dataclass(frozen=True, slots=True, kw_only=True)
class Retain:
    """Rows stay on disk until evicted by quota."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """At most `window_bytes` stay on disk; the forward pass waits for the slowest attached reader.

    Without any reader for `reader_grace_s` seconds the extraction ends with READER_STALLED.
    """

    window_bytes: int = 256 * _MIB
    reader_grace_s: float = 60.0

    def __post_init__(self) -> None:
        if self.window_bytes < _MIB:
            raise InvalidArgument(f"a window has at least 1 MiB, not {self.window_bytes} bytes")


Retention = Retain | Window


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderStatus:
    """One attached reader; every row before `next_row` is released by it."""

    reader: str
    next_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """The job that appends rows of some columns to a set."""

    id: str
    set_id: str
    model_id: str
    corpus_id: str
    hookpoints: tuple[str, ...]
    recipe: Recipe
    retention: Retention
    state: ExtractionState
    max_rows: int = 0
    failure: Failure | None = None
    n_rows: int = 0
    n_rows_expected: int | None = None
    n_rows_exact: bool = False
    n_rows_computed: int = 0
    rows_per_s: float = 0.0
    size_bytes: int = 0
    eta_s: float | None = None
    transfer: Transfer | None = None
    queue_position: int = 0
    waiting_for: tuple[ReaderStatus, ...] = ()
    readers: tuple[ReaderStatus, ...] = ()
    path: str = ""
    cached: bool = False
    n_non_finite: int = 0
    receipt: ParityReceipt | None = None
    create_time: datetime | None = None
    update_time: datetime | None = None

    @property
    def ended(self) -> bool:
        """True when nothing more will happen."""
        return self.state in (ExtractionState.DONE, ExtractionState.FAILED, ExtractionState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionEvent:
    """One event of an extraction; the first after each connection is a snapshot."""

    seq: int
    extraction: Extraction
    snapshot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What an extraction would take. `seconds` is None while the node has not seen the model run.

    `new_bytes` would be written, and the node could take `available_bytes` now; None where it can't tell.
    """

    n_rows: int
    size_bytes: int
    seconds: float | None
    n_tokens: int
    n_rows_cached: int
    new_bytes: int | None = None
    available_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hookpoint:
    """A named place in the network; `unavailable` says why it can't be captured, empty when it can.

    `shape` is that of one row, such as (heads, width of a head); `module` is where it is taken, `<path>:in` or `:out`.
    """

    name: str
    width: int
    unavailable: str = ""
    shape: tuple[int, ...] = ()
    module: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPin:
    """Somebody's wish that a set is kept, until `expire_time` or for ever."""

    owner: str
    reason: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSet:
    """What one node holds of one set; `holders` read or extend it now."""

    id: str
    node_id: str
    model_id: str
    corpus_id: str
    columns: tuple[str, ...]
    n_rows: int
    size_bytes: int
    complete: bool
    retention: str
    path: str
    create_time: datetime | None = None
    update_time: datetime | None = None
    last_used_time: datetime | None = None
    pins: tuple[SetPin, ...] = ()
    holders: tuple[str, ...] = ()
    deleting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a stream; values of an 8-bit one are to be multiplied by `scale_column`."""

    name: str
    dtype: Dtype
    width: int
    scale_column: str = ""
    shape: tuple[int, ...] = ()  # Of one row; empty where it is (width,).

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnStatistics:
    """Statistics of one hookpoint column over the first `count` rows; `mean` and `m2` have one value per element."""

    name: str
    count: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    mean_norm: float
    mean_squared_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamHeader:
    """The first message of a stream. Rows are counted in places of the reading order if `block_rows` is not 0.

    `mapped` tells that sealed rows are announced only, for a client that finds `nonce` in the set's folder at `path`.
    """

    set_id: str
    columns: tuple[Column, ...]
    first_row: int
    end_row: int
    reader: str
    statistics: tuple[ColumnStatistics, ...] = ()
    path: str = ""
    mapped: bool = False
    nonce: str = ""
    block_rows: int = 0


class StreamState(StrEnum):
    """What a stream is doing."""

    CONNECTING = "CONNECTING"
    STREAMING = "STREAMING"
    WAITING = "WAITING"
    RECONNECTING = "RECONNECTING"
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a stream goes.

    Shares are of the last seconds. `stream_wait` is the share in which the consumer waited for rows: `extractor_wait`
    of it for rows that were not computed yet, `network_wait` for rows that were under way. `consumer_wait` is the share
    in which the stream stood still because the queue was full. In all, the consumer waited `wait_s` for rows, and took
    `step_s` from one batch to asking for the next. `n_dropped` counts rows left out as outliers; `mapped` tells that
    rows come from the set's files.
    """

    state: StreamState
    extraction_state: ExtractionState | None
    rows: int
    next_row: int
    end_row: int | None
    n_rows_committed: int
    rows_per_s: float
    size_bytes: int
    queued_bytes: int
    stream_wait: float
    consumer_wait: float
    n_reconnects: int
    epoch: int = 0
    extractor_wait: float = 0.0
    network_wait: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    n_dropped: int = 0
    mapped: bool = False

    @property
    def bottleneck(self) -> Bottleneck:
        """What holds the stream up."""
        return bottleneck(extractor_wait=self.extractor_wait, network_wait=self.network_wait)


def choice(kind: type[_E], value: str, name: str) -> _E:
    """Returns `value` as a member of `kind`, or raises InvalidArgument that lists the members."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise InvalidArgument(f"{name} is one of {known}, not {value!r}", fields={name: known}) from None
