"""Errors that say what to do: bytes needed, bytes offered, holders of the memory, when to try again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace_chassis.errors import ServiceError
from headrace_registry.errors import (
    CapacityBusy,
    DeviceOom,
    LoadFailed,
    ModelChanged,
    ModelTooLarge,
    QueueFull,
    RunnerLost,
)
from headrace_registry.models.models import Failure
from headrace_registry.residency.placement import Action, Backoff, Decision, Space, n_queued
from headrace_registry.residency.residency import Occupant, Residency, ResidencyState

_RETRY_AFTER_S = 5.0
_MAX_HOLDERS = 20
# Loading the same files on another device ends the same way.
_EVERYWHERE = ("MODEL_UNSUPPORTED", "MODEL_CHANGED", "DIGEST_MISMATCH", "NOT_ALLOWED", "MODEL_NOT_READY")
_KINDS = {"DEVICE_OOM": DeviceOom, "RUNNER_LOST": RunnerLost, "MODEL_CHANGED": ModelChanged}


def refusal(model_id: str, decision: Decision, spaces: Sequence[Space]) -> ServiceError:
    """Returns the error of a decision that refuses."""
    space = decision.space
    if decision.action is Action.TOO_LARGE:
        largest_bytes = max(space.device.capacity_bytes for space in spaces)
        return ModelTooLarge(
            f"model {model_id!r} needs {space.required_bytes} bytes, the largest device offers {largest_bytes}; "
            "add a device, raise its budget, or load in a smaller dtype",
            metadata={"required_bytes": str(space.required_bytes), "largest_bytes": str(largest_bytes)},
            resource=("model", model_id),
        )
    if decision.action is Action.BACKOFF:
        assert space.backoff is not None
        return backoff_error(model_id, space.backoff, space.required_bytes)
    if decision.action is Action.FULL:
        return queue_full(f"{n_queued(space)} models wait for {space.node.id}/{space.device.id} already")
    assert decision.action is Action.BUSY
    held = holders_of(o for o in space.node.occupants if o.device_id == space.device.id and o.pinned)
    return CapacityBusy(
        f"model {model_id!r} needs {space.required_bytes} bytes, but pins keep {space.node.id}/{space.device.id} for "
        f"{', '.join(held)}; unpin something, or choose another device",
        metadata={"required_bytes": str(space.required_bytes), "holders": ", ".join(held)},
        retry_after_s=_RETRY_AFTER_S,
    )


def queue_full(what: str) -> QueueFull:
    """Returns the error for a call that would be one too many to wait; `what` begins the message."""
    return QueueFull(f"{what}; try again later", retry_after_s=_RETRY_AFTER_S)


def load_error(residency: Residency) -> LoadFailed:
    """Returns the error for a call that waited for a load which the node reported as failed."""
    failure = residency.failure or Failure(reason="LOAD_FAILED", message="the node gave no reason; see its log")
    kind = _kind_of(failure)
    return kind(
        f"model {residency.model_id!r} could not be loaded: {failure.message}",
        metadata={
            "node_reason": failure.reason,
            "estimated_bytes": str(residency.reserved_bytes),
            "measured_bytes": str(residency.measured_bytes),
        },
        retry_after_s=1.0 if kind is RunnerLost else None,
        resource=("model", residency.model_id),
    )


def interrupted_error(residency: Residency) -> RunnerLost:
    """Returns the error for a call whose loads were ended from outside, each time anew."""
    return RunnerLost(
        f"the load of model {residency.model_id!r} was ended from outside several times ({residency.reason}); look for "
        f"what ends processes on node {residency.node_id}, such as a guard of its memory, and try again",
        metadata={"node_reason": "RUNNER_LOST", "node_id": residency.node_id},
        retry_after_s=_RETRY_AFTER_S,
        resource=("model", residency.model_id),
    )


def backoff_error(model_id: str, backoff: Backoff, required_bytes: int) -> LoadFailed:
    """Returns the last failure's error, for a call that comes while no load is tried."""
    failure = backoff.failure
    return _kind_of(failure)(
        f"model {model_id!r} could not be loaded a moment ago: {failure.message}; "
        f"it is tried again in {backoff.left_s:.1f} s at the earliest",
        metadata={
            "node_reason": failure.reason,
            "estimated_bytes": str(required_bytes),
            "measured_bytes": "0",
            "left_alone_s": f"{backoff.left_s:.3f}",
        },
        retry_after_s=max(0.1, backoff.left_s),
        resource=("model", model_id),
    )


def same_everywhere(residency: Residency) -> bool:
    """True if a failed load would fail on any other device as well."""
    return residency.failure is not None and residency.failure.reason in _EVERYWHERE


def holders_of(occupants: Iterable[Occupant]) -> tuple[str, ...]:
    """Says, for people, what keeps memory: holders of leases with their models, else a pin or the residency's state."""
    held: list[str] = []
    for occupant in occupants:
        model_id = occupant.model_id
        if occupant.holders:
            held += [f"{holder or 'someone'} ({model_id})" for holder in occupant.holders]
        elif occupant.pinned:
            held.append(f"a pin ({model_id})")
        elif occupant.state is ResidencyState.RESIDENT:
            held.append(f"idle {model_id}")
        else:
            held.append(f"{occupant.state.lower()} {model_id}")
    return tuple(held[:_MAX_HOLDERS])


def _kind_of(failure: Failure) -> type[LoadFailed]:
    return _KINDS.get(failure.reason, LoadFailed)
