"""Residency: what is in which device's memory, and the decisions about it as pure functions of values.

    QUEUED → LOADING → RESIDENT → UNLOADING → UNLOADED       FAILED · LOST end a residency from any state

Bytes of LOADING, RESIDENT, DRAINING and UNLOADING are held: they count against the device until the node says that the
memory is back. A QUEUED residency claims bytes that are on their way: nobody who comes later gets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum

from registry_service.models import Failure, Transfer
from registry_service.nodes import DeviceKind


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

    @property
    def ended(self) -> bool:
        """True once nothing more happens to it."""
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
# At most one of these per model and device; beside it an older one may still be unloading.
_JOINABLE = (ResidencyState.QUEUED, ResidencyState.LOADING, ResidencyState.RESIDENT)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """What the admission decision needs to know of an active residency on a device."""

    residency_id: str
    model_id: str
    state: ResidencyState
    reserved_bytes: int
    n_leases: int = 0
    pinned: bool = False
    n_waiters: int = 0
    last_used: float = 0.0
    holders: tuple[str, ...] = ()

    @property
    def evictable(self) -> bool:
        """True for the idle: leased, pinned, awaited or still loading is never a victim."""
        idle = not (self.n_leases or self.pinned or self.n_waiters)
        return self.state is ResidencyState.RESIDENT and idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A device a model may go to, with what is on it and what the model would take there."""

    node_id: str
    device_id: str
    kind: DeviceKind
    capacity_bytes: int
    required_bytes: int
    occupants: tuple[Occupant, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes that are not free now."""
        return sum(o.reserved_bytes for o in self.occupants if o.state.holds_memory)

    @property
    def claimed_bytes(self) -> int:
        """Bytes promised to those who wait."""
        return sum(o.reserved_bytes for o in self.occupants if o.state is ResidencyState.QUEUED)

    @property
    def returning_bytes(self) -> int:
        """Bytes that come back by themselves."""
        going = (ResidencyState.DRAINING, ResidencyState.UNLOADING)
        return sum(o.reserved_bytes for o in self.occupants if o.state in going)


class Action(IntEnum):
    """What to do about a request, the cheapest first."""

    JOIN = 0  # An active residency of this model is there: use it.
    LOAD = 1  # It fits now.
    WAIT = 2  # It fits once memory on its way back has come.
    EVICT = 3  # It fits once `victims` are unloaded.
    BUSY = 4  # It fits the device, but others hold it.
    TOO_LARGE = 5  # It never fits.


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and where. `space` is the best one even when the answer is no."""

    action: Action
    space: Space
    victims: tuple[str, ...] = ()
    joined: str = ""


# An accelerator is worth an eviction before the CPU of the same cluster is used.
_KIND_RANK = {DeviceKind.CUDA: 0, DeviceKind.MPS: 1, DeviceKind.CPU: 2}


def decide_placement(model_id: str, spaces: Sequence[Space]) -> Decision:
    """Chooses among all allowed devices: where the model is already, then the best device it fits on.

    `spaces` is not empty. Deterministic: ties fall to the device with most room, then to the names.
    """
    assert spaces
    return min((decide_on_device(model_id, space) for space in spaces), key=_rank)


def _rank(decision: Decision) -> tuple[bool, int, int, int, int, str, str]:
    space = decision.space
    refused = max(Action.EVICT, decision.action)
    free = space.capacity_bytes - space.held_bytes - space.claimed_bytes
    return (
        decision.action is not Action.JOIN,
        refused,
        _KIND_RANK[space.kind],
        decision.action,
        -free,
        space.node_id,
        space.device_id,
    )


def decide_on_device(model_id: str, space: Space) -> Decision:
    """Decides for one device. Never takes what is held, never promises the same bytes twice."""
    for occupant in space.occupants:
        if occupant.model_id == model_id and occupant.state in _JOINABLE:
            return Decision(action=Action.JOIN, space=space, joined=occupant.residency_id)
    if space.required_bytes > space.capacity_bytes:
        return Decision(action=Action.TOO_LARGE, space=space)
    free = space.capacity_bytes - space.held_bytes - space.claimed_bytes
    if space.required_bytes <= free:
        return Decision(action=Action.LOAD, space=space)
    missing = space.required_bytes - free - space.returning_bytes
    if missing <= 0:
        return Decision(action=Action.WAIT, space=space)
    victims = choose_victims(space.occupants, missing)
    if victims:
        return Decision(action=Action.EVICT, space=space, victims=victims)
    return Decision(action=Action.BUSY, space=space)


def choose_victims(occupants: Sequence[Occupant], missing_bytes: int) -> tuple[str, ...]:
    """Names the least recently used idle residencies that give `missing_bytes`, none needlessly; else nothing."""
    chosen: list[Occupant] = []
    freed = 0
    for occupant in sorted((o for o in occupants if o.evictable), key=lambda o: (o.last_used, o.residency_id)):
        if freed >= missing_bytes:
            break
        chosen.append(occupant)
        freed += occupant.reserved_bytes
    if freed < missing_bytes:
        return ()
    for occupant in sorted(chosen, key=lambda o: -o.last_used):  # Spare the recently used that turned out needless.
        if freed - occupant.reserved_bytes >= missing_bytes:
            chosen.remove(occupant)
            freed -= occupant.reserved_bytes
    return tuple(occupant.residency_id for occupant in chosen)


def next_to_load(queue: Sequence[tuple[str, int]], free_bytes: int) -> tuple[str, ...]:
    """Promotes queued (id, bytes), the oldest first, while they fit; nobody overtakes who waits longer."""
    promoted: list[str] = []
    for residency_id, required_bytes in queue:
        if required_bytes > free_bytes:
            break
        promoted.append(residency_id)
        free_bytes -= required_bytes
    return tuple(promoted)


def follow_report(current: ResidencyState, reported: ResidencyState) -> ResidencyState | None:
    """The state after a node's report, or None where the report contradicts what has ended.

    Late reports do no harm: progress of a load that is done, and anything but an end while unloading, change nothing.
    """
    ends = (ResidencyState.UNLOADED, ResidencyState.FAILED)
    if current.ended:
        return current if reported in ends else None
    if current is ResidencyState.QUEUED:
        return current
    if current in (ResidencyState.UNLOADING, ResidencyState.DRAINING):
        return ResidencyState.UNLOADED if reported in ends else current
    if reported is ResidencyState.LOADING:
        return current
    return reported
