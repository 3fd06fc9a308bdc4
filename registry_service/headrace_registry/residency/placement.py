"""Decides on which device a model goes: one that has it, else one with room, else one with room after evictions.

Pure functions of nodes and policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from headrace_registry.models.models import Failure
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Occupant, ResidencyState
from headrace_registry.residency.scheduling import DeviceView, NodeView, Outcome, Plan, pinned_bytes, plan

# Id of the new residency in decisions that store none, such as estimates; no stored residency has an empty id.
_CANDIDATE = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Why no load is tried on a device for `left_s` more seconds."""

    left_s: float
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A device that a model may go to, and the bytes it would take there."""

    node: NodeView
    device: DeviceView
    required_bytes: int
    backoff: Backoff | None = None


class Action(IntEnum):
    """The answer to a request for a model, the best first."""

    JOIN = 0  # An active residency of this model is on the device: use it.
    LOAD = 1  # It fits now.
    WAIT = 2  # It fits once memory on its way back has come.
    EVICT = 3  # It fits once other models have left for it.
    QUEUE = 4  # It fits once other models are done with the memory they hold.
    FULL = 5  # It would have to wait, and too many do.
    BACKOFF = 6  # It failed on the device a moment ago.
    BUSY = 7  # Pins leave no room for it.
    TOO_LARGE = 8  # It never fits.

    @property
    def refuses(self) -> bool:
        """True if nothing is done."""
        return self >= Action.FULL


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An action on a device, and the plan that carries it out."""

    action: Action
    # The best device even if the action refuses: the error tells about it.
    space: Space
    # Id of the model's residency to join; empty if none is active on the device.
    joined: str = ""
    # Everything then due on the node, this model's own load and the evictions for it included. None for JOIN and
    # refusals: nothing is carried out.
    plan: Plan | None = None


# An accelerator is worth an eviction before the CPU of the same cluster is used.
_KIND_RANK = {DeviceKind.CUDA: 0, DeviceKind.MPS: 1, DeviceKind.CPU: 2}
_JOINABLE = (ResidencyState.QUEUED, ResidencyState.LOADING, ResidencyState.RESIDENT)


def decide_placement(
    model_id: str, spaces: Sequence[Space], policy: Policy, *, residency_id: str = _CANDIDATE, actor: str = ""
) -> Decision:
    """Chooses among all allowed devices. Ties fall to the shorter queue, then to most room, then to the names.

    `spaces` is not empty. A model that is queued somewhere stays in that queue unless it is active or fits elsewhere
    now. A new residency gets `residency_id` and `actor`.
    """
    assert spaces
    decisions = [decide_on_device(model_id, space, policy, residency_id=residency_id, actor=actor) for space in spaces]
    best = min(decisions, key=_rank)
    queued = next((d for d in decisions if d.joined and d.action is not Action.JOIN and not d.action.refuses), None)
    if queued is not None and not best.joined and best.action is not Action.LOAD:
        return queued
    return best


def decide_on_device(
    model_id: str, space: Space, policy: Policy, *, residency_id: str = _CANDIDATE, actor: str = ""
) -> Decision:
    """Decides for one device: JOINs a residency that loads or is loaded, else tells how a queued one would stand.

    The queued one is the model's own residency if it has one in the device's queue, else a new one, last in line.
    """
    occupants = (o for o in space.node.occupants if o.model_id == model_id and o.device_id == space.device.id)
    active = next((o for o in occupants if o.state in _JOINABLE), None)
    if active is not None and active.state is not ResidencyState.QUEUED:
        return Decision(action=Action.JOIN, space=space, joined=active.residency_id)
    joined = active.residency_id if active is not None else ""
    required_bytes = active.reserved_bytes if active is not None else space.required_bytes
    refused: Action | None = None
    if required_bytes > space.device.capacity_bytes:
        refused = Action.TOO_LARGE
    elif active is None and space.backoff is not None:
        refused = Action.BACKOFF
    elif required_bytes > space.device.capacity_bytes - pinned_bytes(space.node, space.device.id):
        refused = Action.BUSY
    if refused is not None:
        return Decision(action=refused, space=space, joined=joined)
    if active is not None:
        due = plan(space.node, policy, awaited=joined)
        return Decision(action=Action(due.outcomes[joined]), space=space, joined=joined, plan=due)
    due = plan_with_candidate(model_id, space, policy, residency_id=residency_id, actor=actor)
    outcome = due.outcomes[residency_id]
    if outcome is not Outcome.LOAD and n_queued(space) >= policy.max_queued:
        return Decision(action=Action.FULL, space=space)
    return Decision(action=Action(outcome), space=space, plan=due)


def plan_with_candidate(
    model_id: str, space: Space, policy: Policy, *, residency_id: str = _CANDIDATE, actor: str = ""
) -> Plan:
    """Plans the node as if the model were last in the device's queue, as `residency_id`, with a waiter.

    The plan holds for the residency that is then stored under this id: queue numbers come from one sequence, so in a
    transaction that holds the locks of the node's devices the new number is larger than all of the node.
    """
    candidate = Occupant(
        residency_id=residency_id,
        model_id=model_id,
        device_id=space.device.id,
        state=ResidencyState.QUEUED,
        reserved_bytes=space.required_bytes,
        queue_seq=max((o.queue_seq for o in space.node.occupants), default=0) + 1,
        n_waiters=1,
        actor=actor,
    )
    with_candidate = replace(space.node, occupants=(*space.node.occupants, candidate))
    return plan(with_candidate, policy, awaited=residency_id)


def n_queued(space: Space) -> int:
    """How many residencies wait on the device."""
    return sum(o.device_id == space.device.id and o.state is ResidencyState.QUEUED for o in space.node.occupants)


def _rank(decision: Decision) -> tuple[int | float | str, ...]:
    """Sorts a resident copy first, then a loading one, then devices where it fits now or later, then refusals."""
    space = decision.space
    joined = next((o for o in space.node.occupants if o.residency_id == decision.joined), None)
    resident = joined is not None and joined.state is ResidencyState.RESIDENT
    on_device = (o for o in space.node.occupants if o.device_id == space.device.id)
    held_bytes = sum(o.reserved_bytes for o in on_device if o.state.holds_memory)
    return (
        0 if decision.action is Action.JOIN and resident else 1 + min(decision.action, 1),
        max(Action.EVICT, decision.action),
        _KIND_RANK[space.device.kind],
        decision.action,
        space.backoff.left_s if space.backoff is not None else 0.0,
        n_queued(space),
        held_bytes + space.device.lost_bytes - space.device.capacity_bytes,
        space.node.id,
        space.device.id,
    )
