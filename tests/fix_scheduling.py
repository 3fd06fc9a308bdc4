"""Nodes and occupants in a line each, and the states that a plan gives them."""

from __future__ import annotations

from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Occupant, ResidencyState
from headrace_registry.residency.scheduling import DeviceView, NodeView, plan

S = ResidencyState
POLICY = Policy()
OLD = 1000.0


def occupant(name: str, n_bytes: int = 10, state: ResidencyState = S.RESIDENT, **fields: object) -> Occupant:
    """Returns an occupant that is old enough to be evicted; a queued one has a waiter."""
    given = {"model_id": f"model-{name}", "device_id": "cpu", "age_s": OLD, "idle_s": 100.0, **fields}
    if state is S.QUEUED:
        given = {"n_waiters": 1, "age_s": 1.0, **given, **fields}
    return Occupant(residency_id=name, state=state, reserved_bytes=n_bytes, **given)


def queued(name: str, n_bytes: int, seq: int, **fields: object) -> Occupant:
    return occupant(name, n_bytes, S.QUEUED, **{"queue_seq": seq, "age_s": 1.0, **fields})


def node(*occupants: Occupant, capacity: int = 100, lost: int = 0, **fields: object) -> NodeView:
    device = DeviceView(id="cpu", kind=DeviceKind.CPU, capacity_bytes=capacity, lost_bytes=lost)
    return NodeView(**{"id": "n", "devices": (device,), "occupants": occupants, **fields})


def states(view: NodeView, policy: Policy = POLICY) -> dict[str, ResidencyState]:
    """Returns the new states of a plan, by residency id."""
    return {step.residency_id: step.state for step in plan(view, policy).steps}
