"""An extraction as plain values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from headrace_extractor.errors import Failure
from headrace_extractor.meters import Transfer
from headrace_extractor.sets.receipt import ParityReceipt
from headrace_extractor.sets.spec import ExtractionSpec


class ExtractionState(StrEnum):
    """Where an extraction stands; `extraction.proto` says when each is entered."""

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
    n_documents_skipped: int = 0
    receipt: ParityReceipt | None = None

    @property
    def eta_s(self) -> float:
        """Seconds left at the present rate; negative while unknown."""
        if self.state.ended:
            return 0.0
        if not self.rows_per_s or not self.n_rows_expected:
            return -1.0
        return max(self.n_rows_expected - self.n_rows, 0) / self.rows_per_s
