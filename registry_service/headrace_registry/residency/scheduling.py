"""Decides which transitions are due on a node: one pure function of the node's occupants and of the policy.

`plan` names every transition: which residencies load from the queues, which are evicted or drained for them, which were
idle for too long, which have no waiter left. It never takes a pinned, loading or too young model, never promises the
same bytes twice, and serves each device's queue in the order of arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Occupant, ResidencyState

_S = ResidencyState
_GOING = (_S.DRAINING, _S.UNLOADING)
_REGISTRY = "registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A device as decisions see it."""

    id: str
    kind: DeviceKind
    capacity_bytes: int
    # Not given back by unloads; counts as held.
    lost_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A living node, its active residencies, and its limits (0: no limit)."""

    id: str
    devices: tuple[DeviceView, ...]
    occupants: tuple[Occupant, ...] = ()
    max_loads: int = 0
    max_residents: int = 0


class Outcome(IntEnum):
    """How a queued residency stands, the best first."""

    LOAD = 1  # It loads now.
    WAIT = 2  # The memory it needs is on its way back by itself.
    EVICT = 3  # The memory it needs comes back because other models leave for it.
    QUEUE = 4  # The memory it needs is held.


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One transition that is due."""

    residency_id: str
    state: ResidencyState
    reason: str
    actor: str = _REGISTRY


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The transitions due now, in order, and how each queued residency stands, by its id."""

    steps: tuple[Step, ...]
    outcomes: Mapping[str, Outcome]


def plan(node: NodeView, policy: Policy, *, awaited: str = "") -> Plan:
    """Decides for a whole node; deterministic.

    `awaited` is a queued residency that the caller waits for: it stays in the queue even without a waiter in the view.
    """
    # A residency queued behind a draining one of the same model need not load if that one stays after all.
    draining = {(o.model_id, o.device_id) for o in node.occupants if o.state is _S.DRAINING}
    queued = [o for o in node.occupants if o.state is _S.QUEUED and o.residency_id != awaited]
    needless = {o.residency_id for o in queued if (o.model_id, o.device_id) in draining}
    while True:
        planner = _Planner(node, policy)
        planner.end_unawaited(awaited)
        planner.end_needless(needless)
        planner.keep_pinned()
        planner.serve_queues()
        planner.end_drains()
        planner.end_idle()
        # Where the draining model does not become resident, its queued residency has to stay in the queue. It may then
        # need memory that another draining model was to keep, so plan again. The set only shrinks, so this ends.
        still = planner.served_by_resident(needless)
        if still == needless:
            return Plan(steps=tuple(planner.steps), outcomes=planner.outcomes)
        needless = still


def choose_victims(candidates: Sequence[Occupant], missing_bytes: int) -> tuple[Occupant, ...]:
    """The least recently used of `candidates` that give `missing_bytes`, none needlessly; nothing if all give less.

    Candidates in use come after all idle ones.
    """
    chosen: list[Occupant] = []
    freed = 0
    for occupant in sorted(candidates, key=_by_use):
        if freed >= missing_bytes:
            break
        chosen.append(occupant)
        freed += occupant.reserved_bytes
    if freed < missing_bytes:
        return ()
    # A large victim chosen late makes smaller ones before it needless: spare the most recently used of them first.
    for occupant in reversed(chosen.copy()):
        if freed - occupant.reserved_bytes >= missing_bytes:
            chosen.remove(occupant)
            freed -= occupant.reserved_bytes
    return tuple(chosen)


def pinned_bytes(node: NodeView, device_id: str) -> int:
    """Returns the bytes on a device that are pinned for longer than any call may wait."""
    return sum(
        o.reserved_bytes
        for o in node.occupants
        if o.device_id == device_id and o.pinned_for_good and o.state in (_S.LOADING, _S.RESIDENT)
    )


@dataclass
class _Claims:
    """Memory that will come back, promised to the residencies first in line.

    `held_up`: devices where a residency was promised nothing, so that all behind it wait; `node_held_up`: the same for
    the node's number of models.
    """

    bytes_by_device: dict[str, int] = field(default_factory=dict)
    n_residents: int = 0
    held_up: set[str] = field(default_factory=set)
    node_held_up: bool = False


class _Planner:
    """The working state of one plan: the states as they will be once the steps so far are done."""

    def __init__(self, node: NodeView, policy: Policy) -> None:
        self.steps: list[Step] = []
        self.outcomes: dict[str, Outcome] = {}
        self._node = node
        self._policy = policy
        self._devices = {device.id: device for device in node.devices}
        self._states = {occupant.residency_id: occupant.state for occupant in node.occupants}
        self._claims = _Claims()

    def end_unawaited(self, awaited: str) -> None:
        """Ends queued residencies without a waiter: they never load."""
        for occupant in self._in(_S.QUEUED):
            if not occupant.n_waiters and occupant.residency_id != awaited:
                self._step(occupant, _S.UNLOADED, "nobody waits any more")

    def end_needless(self, needless: Collection[str]) -> None:
        """Ends queued residencies of models that stay resident on the device: their waiters join the resident one."""
        for occupant in self._in(_S.QUEUED):
            if occupant.residency_id in needless:
                self._step(occupant, _S.UNLOADED, "the model stays where it drained; nobody else waits for its memory")

    def served_by_resident(self, needless: Collection[str]) -> set[str]:
        """Returns the ids in `needless` of models that are resident on the device after this plan."""
        resident = {(o.model_id, o.device_id) for o in self._in(_S.RESIDENT)}
        ended = (o for o in self._node.occupants if o.residency_id in needless)
        return {o.residency_id for o in ended if (o.model_id, o.device_id) in resident}

    def keep_pinned(self) -> None:
        """Makes a draining residency RESIDENT again if it was pinned since."""
        for occupant in self._in(_S.DRAINING):
            if occupant.pinned and not self._has_successor(occupant):
                self._step(occupant, _S.RESIDENT, "pinned")

    def end_drains(self) -> None:
        """Unloads drained residencies without a lease; makes RESIDENT again if no queued one needs the memory.

        Leased ones are looked at first: each that stays may make another one needed.
        """
        draining = [o for o in self._in(_S.DRAINING) if o.state is _S.DRAINING]
        for occupant in sorted(draining, key=lambda o: (bool(o.n_leases), *_by_use(o)), reverse=True):
            if not self._is_needed(occupant) and not self._has_successor(occupant):
                self._step(occupant, _S.RESIDENT, "nobody waits for its memory any more")
            elif not occupant.n_leases:
                self._step(occupant, _S.UNLOADING, "drained: its last lease ended")

    def serve_queues(self) -> None:
        """Serves each device's queue in the order of arrival; a residency that can't be served holds up the next."""
        claims = self._claims
        for waiting in self._in(_S.QUEUED):
            device = self._devices.get(waiting.device_id)
            room = device.capacity_bytes - pinned_bytes(self._node, device.id) if device is not None else -1
            # One that can never fit beside the pinned models must not hold up the others until its own deadline.
            fits = waiting.reserved_bytes <= room
            if not fits or claims.node_held_up or waiting.device_id in claims.held_up:
                self.outcomes[waiting.residency_id] = Outcome.QUEUE
                continue
            outcome = self._serve(waiting)
            self.outcomes[waiting.residency_id] = outcome
            if outcome is Outcome.QUEUE:
                claims.held_up.add(waiting.device_id)
                # There is room on the device, so it is the node's number of models that it waits for.
                claims.node_held_up = self._missing_bytes(waiting.device_id, waiting) <= 0
            elif outcome is not Outcome.LOAD:
                claimed = claims.bytes_by_device.get(waiting.device_id, 0)
                claims.bytes_by_device[waiting.device_id] = claimed + waiting.reserved_bytes
                claims.n_residents += 1

    def end_idle(self) -> None:
        """Unloads models that were not used for the idle timeout."""
        limit_s = self._policy.idle_timeout_s
        for occupant in self._in(_S.RESIDENT) if limit_s else ():
            unused_s = min(occupant.idle_s, occupant.age_s)
            if not occupant.in_use and not occupant.pinned and unused_s >= limit_s:
                self._step(occupant, _S.UNLOADING, f"idle for {limit_s:g} s")

    def _serve(self, waiting: Occupant) -> Outcome:
        """Loads it, or counts on memory that is coming back, or evicts for it; the first that is enough."""
        missing = self._missing_bytes(waiting.device_id, waiting)
        surplus = self._surplus_residents(waiting)
        if self._node.max_loads and self._count((_S.LOADING,)) >= self._node.max_loads:
            return Outcome.WAIT
        if missing <= 0 and surplus <= 0:
            self._step(waiting, _S.LOADING, "memory is there")
            return Outcome.LOAD
        draining = self._in(_S.DRAINING)
        going_now = [*self._in(_S.UNLOADING), *(o for o in draining if not o.n_leases)]
        going_once_released = [o for o in draining if o.n_leases]
        idle = [o for o in self._in(_S.RESIDENT) if self._replaceable(o) and not o.in_use]
        for going in (going_now, going_once_released):
            missing, surplus = _less(going, waiting.device_id, missing, surplus)
            if missing <= 0 and surplus <= 0:
                return Outcome.WAIT
            # Idle models go before it waits for leases to end.
            if self._evict(idle, waiting, missing, surplus):
                return Outcome.EVICT
        if waiting.age_s >= self._policy.max_wait_s:
            old_enough = [o for o in self._in(_S.RESIDENT) if self._replaceable(o)]
            if self._evict(old_enough, waiting, missing, surplus):
                return Outcome.EVICT
        return Outcome.QUEUE

    def _evict(self, candidates: Sequence[Occupant], waiting: Occupant, missing: int, surplus: int) -> bool:
        """Evicts victims for the missing bytes and the surplus of models; none, and False, unless both are met."""
        on_device = [o for o in candidates if o.device_id == waiting.device_id]
        victims = choose_victims(on_device, missing) if missing > 0 else ()
        if missing > 0 and not victims:
            return False
        others = sorted((o for o in candidates if o not in victims), key=_by_use)
        n_more = max(0, surplus - len(victims))
        if len(others) < n_more:
            return False
        victims = (*victims, *others[:n_more])
        for victim in victims:
            if victim.in_use:
                reason = f"drained for {waiting.model_id}, which waited {waiting.age_s:.0f} s"
                self._step(victim, _S.DRAINING, reason, actor=waiting.actor)
            else:
                self._step(victim, _S.UNLOADING, f"evicted for {waiting.model_id}", actor=waiting.actor)
        return bool(victims)

    def _replaceable(self, occupant: Occupant) -> bool:
        # A draining model that stays after all has no age in its new state: `age_s` counts since it began to drain.
        settled = occupant.state is not _S.RESIDENT or occupant.age_s >= self._policy.min_residency_s
        return settled and not occupant.pinned

    def _is_needed(self, draining: Occupant) -> bool:
        """True if a queued residency would get less if this one stayed."""
        claims, device_id = self._claims, draining.device_id
        if claims.node_held_up or device_id in claims.held_up:
            return True
        missing, surplus = self._missing_bytes(device_id), self._surplus_residents()
        others = [o for o in (*self._in(_S.DRAINING), *self._in(_S.UNLOADING)) if o is not draining]
        # A leased model with a successor leaves in any case, but only once its leases end: no claim has to wait for it.
        sooner = [o for o in others if not (o.n_leases and self._has_successor(o))]
        missing, surplus = _less(sooner, device_id, missing, surplus)
        return (missing > 0 and device_id in claims.bytes_by_device) or (surplus > 0 and claims.n_residents > 0)

    def _missing_bytes(self, device_id: str, *more: Occupant) -> int:
        """Bytes that all claims and `more` lack on a device while everything on it stays."""
        device = self._devices.get(device_id)
        if device is None:
            return 0
        on_device = (o for o in self._node.occupants if o.device_id == device_id)
        holding = (_S.LOADING, _S.RESIDENT, *_GOING)
        held = sum(o.reserved_bytes for o in on_device if self._states[o.residency_id] in holding)
        wanted = self._claims.bytes_by_device.get(device.id, 0) + sum(o.reserved_bytes for o in more)
        return wanted + held + device.lost_bytes - device.capacity_bytes

    def _surplus_residents(self, *more: Occupant) -> int:
        """By how many models all claims and `more` would pass the node's limit while everything stays."""
        if not self._node.max_residents:
            return 0
        n_held = self._count((_S.LOADING, _S.RESIDENT, *_GOING))
        return n_held + self._claims.n_residents + len(more) - self._node.max_residents

    def _has_successor(self, occupant: Occupant) -> bool:
        active = (*self._in(_S.QUEUED), *self._in(_S.LOADING), *self._in(_S.RESIDENT))
        return any(o.model_id == occupant.model_id and o.device_id == occupant.device_id for o in active)

    def _in(self, state: ResidencyState) -> list[Occupant]:
        found = (o for o in self._node.occupants if self._states[o.residency_id] is state)
        return sorted(found, key=lambda o: (o.queue_seq, o.residency_id))

    def _count(self, states: Iterable[ResidencyState]) -> int:
        chosen = tuple(states)
        return sum(state in chosen for state in self._states.values())

    def _step(self, occupant: Occupant, state: ResidencyState, reason: str, *, actor: str = _REGISTRY) -> None:
        self._states[occupant.residency_id] = state
        self.steps.append(Step(residency_id=occupant.residency_id, state=state, reason=reason, actor=actor))


def _by_use(occupant: Occupant) -> tuple[bool, float, int, str]:
    return (occupant.in_use, -occupant.idle_s, occupant.queue_seq, occupant.residency_id)


def _less(going: Iterable[Occupant], device_id: str, missing: int, surplus: int) -> tuple[int, int]:
    """Returns the bytes missing on the device and the surplus of models on the node once `going` are gone."""
    gone = list(going)
    return missing - sum(o.reserved_bytes for o in gone if o.device_id == device_id), surplus - len(gone)
