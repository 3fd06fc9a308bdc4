"""What happens next on a node: one pure function of what is there and of the policy.

`plan` names every transition that is due: who is promoted from the queues, who is evicted or drained for whom, who was
idle too long, who waits for nobody. It never takes what is pinned, loading or too young, never promises bytes twice,
and nobody overtakes who waits longer on the same device.
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
    """A living node, everything active on it, and its limits (0: none)."""

    id: str
    devices: tuple[DeviceView, ...]
    occupants: tuple[Occupant, ...] = ()
    max_loads: int = 0
    max_residents: int = 0


class Outcome(IntEnum):
    """How one that is queued stands, the best first."""

    LOAD = 1  # It loads now.
    WAIT = 2  # What it needs is on its way back by itself.
    EVICT = 3  # What it needs comes back because others leave for it.
    QUEUE = 4  # What it needs is held.


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One transition that is due."""

    residency_id: str
    state: ResidencyState
    reason: str
    actor: str = _REGISTRY


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is due now, in order, and how those stand who are queued."""

    steps: tuple[Step, ...]
    outcomes: Mapping[str, Outcome]


def plan(node: NodeView, policy: Policy, *, awaited: str = "") -> Plan:
    """Decides for a whole node; deterministic. Whoever asks waits for `awaited`, which stays in line."""
    needless = _doubled(node, awaited)
    while True:
        planner = _Planner(node, policy)
        planner.end_unawaited(awaited)
        planner.end_needless(needless)
        planner.keep_pinned()
        planner.serve_queues()
        planner.end_drains()
        planner.end_idle()
        # One that has to stay in line after all may need what another's model would come back to.
        still = planner.served_by_what_stays(needless)
        if still == needless:
            return Plan(steps=tuple(planner.steps), outcomes=planner.outcomes)
        needless = still


def _doubled(node: NodeView, awaited: str) -> set[str]:
    """Who is queued for a model that drains on the same device: it need not load if that stays."""
    draining = {(o.model_id, o.device_id) for o in node.occupants if o.state is _S.DRAINING}
    queued = (o for o in node.occupants if o.state is _S.QUEUED and o.residency_id != awaited)
    return {o.residency_id for o in queued if (o.model_id, o.device_id) in draining}


def choose_victims(candidates: Sequence[Occupant], missing_bytes: int) -> tuple[Occupant, ...]:
    """The least recently used of `candidates` that give `missing_bytes`, none needlessly; nothing if all give less.

    Those in use come after all idle ones.
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
    for occupant in reversed(chosen.copy()):  # Spare the recently used that turned out needless.
        if freed - occupant.reserved_bytes >= missing_bytes:
            chosen.remove(occupant)
            freed -= occupant.reserved_bytes
    return tuple(chosen)


def _by_use(occupant: Occupant) -> tuple[bool, float, int, str]:
    return (occupant.in_use, -occupant.idle_s, occupant.queue_seq, occupant.residency_id)


@dataclass
class _Claims:
    """What those first in line have been promised of what comes back, and where somebody is promised nothing yet."""

    bytes_by_device: dict[str, int] = field(default_factory=dict)
    n_residents: int = 0
    held_up: set[str] = field(default_factory=set)
    node_held_up: bool = False


class _Planner:
    """The scratch paper of one plan: states as they will be once the steps so far are done."""

    def __init__(self, node: NodeView, policy: Policy) -> None:
        self.steps: list[Step] = []
        self.outcomes: dict[str, Outcome] = {}
        self._node = node
        self._policy = policy
        self._devices = {device.id: device for device in node.devices}
        self._states = {occupant.residency_id: occupant.state for occupant in node.occupants}
        self._claims = _Claims()

    def end_unawaited(self, awaited: str) -> None:
        """A queued residency that nobody waits for never loads."""
        for occupant in self._in(_S.QUEUED):
            if not occupant.n_waiters and occupant.residency_id != awaited:
                self._step(occupant, _S.UNLOADED, "nobody waits any more")

    def end_needless(self, needless: Collection[str]) -> None:
        """Who waits for a model to load that stays on the device has only to join it."""
        for occupant in self._in(_S.QUEUED):
            if occupant.residency_id in needless:
                self._step(occupant, _S.UNLOADED, "the model stays where it drained; nobody else waits for its memory")

    def served_by_what_stays(self, needless: Collection[str]) -> set[str]:
        """Those of `needless` whose model is there."""
        there = {(o.model_id, o.device_id) for o in self._in(_S.RESIDENT)}
        ended = (o for o in self._node.occupants if o.residency_id in needless)
        return {o.residency_id for o in ended if (o.model_id, o.device_id) in there}

    def keep_pinned(self) -> None:
        """Who is pinned meanwhile does not drain any more."""
        for occupant in self._in(_S.DRAINING):
            if occupant.pinned and not self._has_successor(occupant):
                self._step(occupant, _S.RESIDENT, "pinned")

    def end_drains(self) -> None:
        """Who drained goes; who drains for nobody stays, those with leases before those without."""
        draining = [o for o in self._in(_S.DRAINING) if o.state is _S.DRAINING]
        for occupant in sorted(draining, key=lambda o: (bool(o.n_leases), *_by_use(o)), reverse=True):
            if not self._is_needed(occupant) and not self._has_successor(occupant):
                self._step(occupant, _S.RESIDENT, "nobody waits for its memory any more")
            elif not occupant.n_leases:
                self._step(occupant, _S.UNLOADING, "drained: its last lease ended")

    def serve_queues(self) -> None:
        """Serves in the order of arrival; who can't be served holds up those behind on the device."""
        claims = self._claims
        for waiting in self._in(_S.QUEUED):
            if claims.node_held_up or waiting.device_id in claims.held_up:
                self.outcomes[waiting.residency_id] = Outcome.QUEUE
                continue
            if not self._could_ever(waiting):
                self.outcomes[waiting.residency_id] = Outcome.QUEUE
                continue
            outcome = self._serve(waiting)
            self.outcomes[waiting.residency_id] = outcome
            if outcome is Outcome.QUEUE:
                claims.held_up.add(waiting.device_id)
                claims.node_held_up = self._missing_bytes(waiting.device_id, waiting) <= 0
            elif outcome is not Outcome.LOAD:
                claimed = claims.bytes_by_device.get(waiting.device_id, 0)
                claims.bytes_by_device[waiting.device_id] = claimed + waiting.reserved_bytes
                claims.n_residents += 1

    def end_idle(self) -> None:
        """Unloads what nobody used for the idle timeout."""
        limit_s = self._policy.idle_timeout_s
        for occupant in self._in(_S.RESIDENT) if limit_s else ():
            unused_s = min(occupant.idle_s, occupant.age_s)
            if not occupant.in_use and not occupant.pinned and unused_s >= limit_s:
                self._step(occupant, _S.UNLOADING, f"idle for {limit_s:g} s")

    def _serve(self, waiting: Occupant) -> Outcome:
        missing = self._missing_bytes(waiting.device_id, waiting)
        surplus = self._surplus_residents(waiting)
        if self._node.max_loads and self._count((_S.LOADING,)) >= self._node.max_loads:
            return Outcome.WAIT
        if missing <= 0 and surplus <= 0:
            self._step(waiting, _S.LOADING, "memory is there")
            return Outcome.LOAD
        idle = [o for o in self._in(_S.RESIDENT) if self._replaceable(o) and not o.in_use]
        for going in self._going():
            missing, surplus = _less(going, waiting.device_id, missing, surplus)
            if missing <= 0 and surplus <= 0:
                return Outcome.WAIT
            if self._evict(idle, waiting, missing, surplus):
                return Outcome.EVICT
        if waiting.age_s >= self._policy.max_wait_s:
            old_enough = [o for o in self._in(_S.RESIDENT) if self._replaceable(o)]
            if self._evict(old_enough, waiting, missing, surplus):
                return Outcome.EVICT
        return Outcome.QUEUE

    def _going(self) -> tuple[list[Occupant], list[Occupant]]:
        """Who goes now; and who goes some day, once its last lease ends."""
        draining = self._in(_S.DRAINING)
        now = [*self._in(_S.UNLOADING), *(o for o in draining if not o.n_leases)]
        return now, [o for o in draining if o.n_leases]

    def _evict(self, candidates: Sequence[Occupant], waiting: Occupant, missing: int, surplus: int) -> bool:
        victims = _enough(candidates, waiting.device_id, missing, surplus)
        for victim in victims:
            self._send_off(victim, waiting)
        return bool(victims)

    def _replaceable(self, occupant: Occupant) -> bool:
        # One that was about to leave and stays has no age in its new state.
        settled = occupant.state is not _S.RESIDENT or occupant.age_s >= self._policy.min_residency_s
        return settled and not occupant.pinned

    def _send_off(self, victim: Occupant, waiting: Occupant) -> None:
        if victim.in_use:
            why = f"drained for {waiting.model_id}, which waited {waiting.age_s:.0f} s"
            self._step(victim, _S.DRAINING, why, actor=waiting.actor)
        else:
            self._step(victim, _S.UNLOADING, f"evicted for {waiting.model_id}", actor=waiting.actor)

    def _could_ever(self, waiting: Occupant) -> bool:
        """Whether it fits beside what is pinned. One that does not must not hold up the others until its deadline."""
        device = self._devices.get(waiting.device_id)
        if device is None:
            return False
        return waiting.reserved_bytes <= device.capacity_bytes - pinned_bytes(self._node, device.id)

    def _is_needed(self, draining: Occupant) -> bool:
        """Whether somebody in line would get less if it stayed."""
        claims, device_id = self._claims, draining.device_id
        if claims.node_held_up or device_id in claims.held_up:
            return True
        missing, surplus = self._missing_bytes(device_id), self._surplus_residents()
        others = [o for o in (*self._in(_S.DRAINING), *self._in(_S.UNLOADING)) if o is not draining]
        # What is in use and can't come back goes some day either way; nobody has to wait for it.
        sooner = [o for o in others if not (o.n_leases and self._has_successor(o))]
        missing, surplus = _less(sooner, device_id, missing, surplus)
        return (missing > 0 and device_id in claims.bytes_by_device) or (surplus > 0 and claims.n_residents > 0)

    def _missing_bytes(self, device_id: str, *more: Occupant) -> int:
        """Bytes that all who were promised some, and `more`, still lack on a device while everything stays."""
        device = self._devices.get(device_id)
        if device is None:
            return 0
        held = self._bytes(device.id, (_S.LOADING, _S.RESIDENT, *_GOING)) + device.lost_bytes
        wanted = self._claims.bytes_by_device.get(device.id, 0) + sum(o.reserved_bytes for o in more)
        return wanted + held - device.capacity_bytes

    def _surplus_residents(self, *more: Occupant) -> int:
        """By how many models the node's limit would be passed with all who were promised a place, and `more`."""
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

    def _bytes(self, device_id: str, states: Iterable[ResidencyState]) -> int:
        chosen = tuple(states)
        return sum(
            o.reserved_bytes
            for o in self._node.occupants
            if o.device_id == device_id and self._states[o.residency_id] in chosen
        )

    def _count(self, states: Iterable[ResidencyState]) -> int:
        chosen = tuple(states)
        return sum(state in chosen for state in self._states.values())

    def _step(self, occupant: Occupant, state: ResidencyState, reason: str, *, actor: str = _REGISTRY) -> None:
        self._states[occupant.residency_id] = state
        self.steps.append(Step(residency_id=occupant.residency_id, state=state, reason=reason, actor=actor))


def pinned_bytes(node: NodeView, device_id: str) -> int:
    """Bytes on a device that stay for longer than anybody may wait."""
    return sum(
        o.reserved_bytes
        for o in node.occupants
        if o.device_id == device_id and o.pinned_for_good and o.state in (_S.LOADING, _S.RESIDENT)
    )


def _less(going: Iterable[Occupant], device_id: str, missing: int, surplus: int) -> tuple[int, int]:
    """What is still missing, of bytes on the device and of places on the node, once these are gone."""
    gone = list(going)
    return missing - sum(o.reserved_bytes for o in gone if o.device_id == device_id), surplus - len(gone)


def _enough(candidates: Sequence[Occupant], device_id: str, missing: int, surplus: int) -> tuple[Occupant, ...]:
    """Victims for bytes on the device and for the node's number of models; nothing unless both are met."""
    victims = choose_victims([o for o in candidates if o.device_id == device_id], missing) if missing > 0 else ()
    if missing > 0 and not victims:
        return ()
    others = sorted((o for o in candidates if o not in victims), key=_by_use)
    wanted = max(0, surplus - len(victims))
    return (*victims, *others[:wanted]) if len(others) >= wanted else ()
