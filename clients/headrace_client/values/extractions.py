"""Extractions, their retention and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from headrace_client.errors import InvalidArgument
from headrace_client.values.common import Failure, Transfer
from headrace_client.values.listing import Shown
from headrace_client.values.receipts import ParityReceipt
from headrace_client.values.recipes import Recipe

_MIB = 1024 * 1024


class ExtractionState(StrEnum):
    """The state of an extraction."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RUNNING = "RUNNING"
    WAITING = "WAITING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    RECOVERING = "RECOVERING"
    UNKNOWN = "UNKNOWN"


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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Extraction(Shown):
    """The job that appends rows of some columns to a set; `node_id` is empty where the caller named an address."""

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "state", "model_id", "corpus_id", "hookpoints", "n_rows", "set_id")

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
    n_documents_skipped: int = 0
    receipt: ParityReceipt | None = None
    create_time: datetime | None = None
    update_time: datetime | None = None
    node_id: str = ""

    @property
    def ended(self) -> bool:
        """True once the state is final."""
        return self.state in (ExtractionState.DONE, ExtractionState.FAILED, ExtractionState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionEvent:
    """One event of an extraction; the first after each connection is a snapshot."""

    seq: int
    extraction: Extraction
    snapshot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of an extraction. `seconds` is None while the node has not seen the model run.

    `new_bytes` would be written, and the node has room for `available_bytes` now; None where the node can't tell.
    """

    n_rows: int
    size_bytes: int
    seconds: float | None
    n_tokens: int
    n_rows_cached: int
    new_bytes: int | None = None
    available_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Hookpoint(Shown):
    """A named place in the network; `unavailable` says why it can't be captured, empty when it can.

    `shape` is the shape of one row, such as (heads, width of a head); `module` names where it is taken, `<path>:in` or
    `<path>:out`.
    """

    SHOWN: ClassVar[tuple[str, ...]] = ("name", "shape", "unavailable")

    name: str
    width: int
    unavailable: str = ""
    shape: tuple[int, ...] = ()
    module: str = ""
