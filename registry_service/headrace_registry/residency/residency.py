"""Residency: which model is in the memory of which device.

    QUEUED → LOADING → RESIDENT → DRAINING → UNLOADING → UNLOADED      FAILED · LOST end a residency from any state

LOADING, RESIDENT, DRAINING and UNLOADING hold their bytes: they count against the device until the node reports that
the memory is back. The next transitions are decided in `scheduling.py`, the device of a model in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from headrace_registry.models.models import Failure, Transfer


class ResidencyState(StrEnum):
    """The stage of one model on one device."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RESIDENT = "RESIDENT"
    DRAINING = "DRAINING"
    UNLOADING = "UNLOADING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"
    LOST = "LOST"

    @property
    def ended(self) -> bool:
        """True once the residency is over and never changes again."""
        return self in (ResidencyState.UNLOADED, ResidencyState.FAILED, ResidencyState.LOST)

    @property
    def holds_memory(self) -> bool:
        """True while its bytes count against the device."""
        return self in _HOLDING


_HOLDING = (
    ResidencyState.LOADING,
    ResidencyState.RESIDENT,
    ResidencyState.DRAINING,
    ResidencyState.UNLOADING,
)


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
    fence: int
    node_epoch: int
    n_leases: int
    reason: str
    actor: str
    create_time: datetime
    update_time: datetime
    last_used_time: datetime
    transfer: Transfer | None = None
    failure: Failure | None = None
    queue_position: int = 0
    pinned: bool = False
    holders: tuple[str, ...] = ()
    load_begin_time: datetime | None = None
    resident_time: datetime | None = None

    @property
    def load_s(self) -> float:
        """Seconds that the load took; 0 until it is loaded."""
        if self.load_begin_time is None or self.resident_time is None:
            return 0.0
        return max(0.0, (self.resident_time - self.load_begin_time).total_seconds())


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """An active residency as decisions see it."""

    residency_id: str
    model_id: str
    device_id: str
    state: ResidencyState
    reserved_bytes: int
    queue_seq: int = 0
    n_leases: int = 0
    n_waiters: int = 0
    pinned: bool = False
    # The pin outlasts every wait.
    pinned_for_good: bool = False
    # Seconds in its state, and since its last lease was granted or released.
    age_s: float = 0.0
    idle_s: float = 0.0
    actor: str = ""
    holders: tuple[str, ...] = ()

    @property
    def in_use(self) -> bool:
        """True while a lease is held on it or a call waits for it."""
        return bool(self.n_leases or self.n_waiters)


def follow_report(current: ResidencyState, reported: ResidencyState, *, failed: bool = False) -> ResidencyState | None:
    """Returns the state after a node's report, or None if the report contradicts a residency that has ended.

    `failed`: the registry gave its load up, and the node only unloads the rest. Late reports do no harm: progress of a
    load that is done changes nothing, and while the residency unloads only the report of its end counts.
    """
    ends = (ResidencyState.UNLOADED, ResidencyState.FAILED)
    if current.ended:
        return current if reported in ends else None
    if current is ResidencyState.QUEUED:
        return current
    if current in (ResidencyState.UNLOADING, ResidencyState.DRAINING):
        if reported not in ends:
            return current
        return ResidencyState.FAILED if failed else ResidencyState.UNLOADED
    if reported is ResidencyState.LOADING:
        return current
    return reported


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyReport:
    """A node's report on one of its residencies."""

    node_id: str
    epoch: int
    residency_id: str
    fence: int
    state: ResidencyState
    transfer: Transfer | None = None
    measured_bytes: int = 0
    failure: Failure | None = None
    lost_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    log_tail: str = ""
