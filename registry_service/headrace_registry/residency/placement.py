"""Where a model goes: where it is, else where it fits, else where it fits once others left. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from headrace_registry.models.models import Failure
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Occupant, ResidencyState
from headrace_registry.residency.scheduling import DeviceView, NodeView, Outcome, Plan, pinned_bytes, plan

# Stands for the model that is being placed; no residency has an empty id.
_CANDIDATE = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """A place to be left alone for `left_s` more, and why."""

    left_s: float
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A device a model may go to, and what it would take there."""

    node: NodeView
    device: DeviceView
    required_bytes: int
    backoff: Backoff | None = None


class Action(IntEnum):
    """What to do about a request, the best first."""

    JOIN = 0  # An active residency of this model is there: use it.
    LOAD = 1  # It fits now.
    WAIT = 2  # It fits once memory on its way back has come.
    EVICT = 3  # It fits once others have left for it.
    QUEUE = 4  # It fits once others are done with what they hold.
    FULL = 5  # It would have to wait, and too many do.
    BACKOFF = 6  # It failed there a moment ago.
    BUSY = 7  # Pins leave no room for it.
    TOO_LARGE = 8  # It never fits.

    @property
    def refuses(self) -> bool:
        """True if nothing is done."""
        return self >= Action.FULL


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and where. `space` is the best one even when the answer is no; `joined` is a residency's id."""

    action: Action
    space: Space
    joined: str = ""


# An accelerator is worth an eviction before the CPU of the same cluster is used.
_KIND_RANK = {DeviceKind.CUDA: 0, DeviceKind.MPS: 1, DeviceKind.CPU: 2}


def decide_placement(model_id: str, spaces: Sequence[Space], policy: Policy) -> Decision:
    """Chooses among all allowed devices. Ties fall to the shorter queue, then to most room, then to the names.

    `spaces` is not empty. A model that is queued somewhere keeps its place unless it is active or fits elsewhere now.
    """
    assert spaces
    decisions = [decide_on_device(model_id, space, policy) for space in spaces]
    best = min(decisions, key=_rank)
    queued = next((d for d in decisions if d.joined and d.action is not Action.JOIN and not d.action.refuses), None)
    if queued is not None and not best.joined and best.action is not Action.LOAD:
        return queued
    return best


def decide_on_device(model_id: str, space: Space, policy: Policy) -> Decision:
    """Decides for one device: JOIN what loads or is resident; how it stands if it is queued; else how it would."""
    there = _active_of(model_id, space)
    if there is not None and there.state is not ResidencyState.QUEUED:
        return Decision(action=Action.JOIN, space=space, joined=there.residency_id)
    return Decision(
        action=_action(model_id, space, policy, there),
        space=space,
        joined=there.residency_id if there is not None else "",
    )


def _action(model_id: str, space: Space, policy: Policy, queued: Occupant | None) -> Action:
    capacity = space.device.capacity_bytes
    required = queued.reserved_bytes if queued is not None else space.required_bytes
    if required > capacity:
        return Action.TOO_LARGE
    if queued is None and space.backoff is not None:
        return Action.BACKOFF
    if required > capacity - pinned_bytes(space.node, space.device.id):
        return Action.BUSY
    if queued is not None:
        return Action(plan(space.node, policy, awaited=queued.residency_id).outcomes[queued.residency_id])
    outcome = plan_with_candidate(model_id, space, policy).outcomes[_CANDIDATE]
    if outcome is not Outcome.LOAD and n_queued(space) >= policy.max_queued:
        return Action.FULL
    return Action(outcome)


def plan_with_candidate(model_id: str, space: Space, policy: Policy) -> Plan:
    """What would happen with the model last in its device's queue."""
    last = max((o.queue_seq for o in space.node.occupants), default=0) + 1
    candidate = Occupant(
        residency_id=_CANDIDATE,
        model_id=model_id,
        device_id=space.device.id,
        state=ResidencyState.QUEUED,
        reserved_bytes=space.required_bytes,
        queue_seq=last,
        n_waiters=1,
    )
    with_it = replace(space.node, occupants=(*space.node.occupants, candidate))
    return plan(with_it, policy, awaited=_CANDIDATE)


def n_queued(space: Space) -> int:
    """How many residencies wait on the device."""
    return sum(o.device_id == space.device.id and o.state is ResidencyState.QUEUED for o in space.node.occupants)


def _active_of(model_id: str, space: Space) -> Occupant | None:
    joinable = (ResidencyState.QUEUED, ResidencyState.LOADING, ResidencyState.RESIDENT)
    return next(
        (
            o
            for o in space.node.occupants
            if o.model_id == model_id and o.device_id == space.device.id and o.state in joinable
        ),
        None,
    )


def _rank(decision: Decision) -> tuple[int | float | str, ...]:
    space = decision.space
    there = next((o for o in space.node.occupants if o.residency_id == decision.joined), None)
    resident = there is not None and there.state is ResidencyState.RESIDENT
    free = space.device.capacity_bytes - space.device.lost_bytes - _held_bytes(space)
    return (
        0 if decision.action is Action.JOIN and resident else 1 + min(decision.action, 1),
        max(Action.EVICT, decision.action),
        _KIND_RANK[space.device.kind],
        decision.action,
        space.backoff.left_s if space.backoff is not None else 0.0,
        n_queued(space),
        -free,
        space.node.id,
        space.device.id,
    )


def _held_bytes(space: Space) -> int:
    on_device = (o for o in space.node.occupants if o.device_id == space.device.id)
    return sum(o.reserved_bytes for o in on_device if o.state.holds_memory)
