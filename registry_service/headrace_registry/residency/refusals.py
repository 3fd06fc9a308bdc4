"""Says no in a way that helps: what would be needed, what there is, who holds it, when to come back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace_chassis.errors import ServiceError
from headrace_registry.errors import CapacityBusy, DeviceOom, LoadFailed, ModelTooLarge, QueueFull, RunnerLost
from headrace_registry.models.models import Failure
from headrace_registry.residency.placement import Action, Backoff, Decision, Space, n_queued
from headrace_registry.residency.residency import Occupant, Residency, ResidencyState

_RETRY_AFTER_S = 5.0
_MAX_HOLDERS = 20
# Loading the same files elsewhere ends the same way.
_EVERYWHERE = ("MODEL_UNSUPPORTED", "DIGEST_MISMATCH", "NOT_ALLOWED", "MODEL_NOT_READY")


def refusal(model_id: str, decision: Decision, spaces: Sequence[Space]) -> ServiceError:
    """Turns a decision that refuses into its error."""
    space = decision.space
    if decision.action is Action.TOO_LARGE:
        return _too_large(model_id, space.required_bytes, spaces)
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
    """The error of whoever would have to wait where too many do."""
    return QueueFull(f"{what}; try again later", retry_after_s=_RETRY_AFTER_S)


def load_error(residency: Residency) -> LoadFailed:
    """Turns what a node reported of a load into the error of the call that waited for it."""
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


def backoff_error(model_id: str, backoff: Backoff, required_bytes: int) -> LoadFailed:
    """The last failure's error, for a call that comes while its places are left alone."""
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
    """Who keeps memory, for people: names with their models; states where nobody holds a lease."""
    return tuple(who for occupant in occupants for who in _holders(occupant))[:_MAX_HOLDERS]


def _holders(occupant: Occupant) -> list[str]:
    if occupant.holders:
        return [f"{holder or 'someone'} ({occupant.model_id})" for holder in occupant.holders]
    if occupant.pinned:
        return [f"a pin ({occupant.model_id})"]
    if occupant.state is ResidencyState.RESIDENT:
        return [f"idle {occupant.model_id}"]
    return [f"{occupant.state.lower()} {occupant.model_id}"]


def _too_large(model_id: str, required: int, spaces: Sequence[Space]) -> ModelTooLarge:
    largest = max(space.device.capacity_bytes for space in spaces)
    return ModelTooLarge(
        f"model {model_id!r} needs {required} bytes, the largest device offers {largest}; "
        "add a device, raise its budget, or load in a smaller dtype",
        metadata={"required_bytes": str(required), "largest_bytes": str(largest)},
        resource=("model", model_id),
    )


def _kind_of(failure: Failure) -> type[LoadFailed]:
    return {"DEVICE_OOM": DeviceOom, "RUNNER_LOST": RunnerLost}.get(failure.reason, LoadFailed)
