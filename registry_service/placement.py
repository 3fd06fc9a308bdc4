"""Says no in a way that helps: what would be needed, what there is, who holds it."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.errors import ServiceError
from registry_service.errors import CapacityBusy, DeviceOom, LoadFailed, ModelTooLarge, RunnerLost
from registry_service.residency import Action, Decision, Occupant, Residency, ResidencyState, Space

_RETRY_AFTER_S = 5.0
_MAX_HOLDERS = 20


def refusal(model_id: str, decision: Decision, spaces: Sequence[Space]) -> ServiceError:
    """Turns a BUSY or TOO_LARGE decision into its error."""
    required = decision.space.required_bytes
    if decision.action is Action.TOO_LARGE:
        largest = max(space.capacity_bytes for space in spaces)
        return ModelTooLarge(
            f"model {model_id!r} needs {required} bytes, the largest device offers {largest}; "
            "add a device, raise its budget, or load in a smaller dtype",
            metadata={"required_bytes": str(required), "largest_bytes": str(largest)},
            resource=("model", model_id),
        )
    holders = [who for occupant in decision.space.occupants for who in _holders(occupant)][:_MAX_HOLDERS]
    return CapacityBusy(
        f"model {model_id!r} needs {required} bytes, but {decision.space.node_id}/{decision.space.device_id} is held "
        f"by {', '.join(holders)}; try again when they are done, or unload something",
        metadata={"required_bytes": str(required), "holders": ", ".join(holders)},
        retry_after_s=_RETRY_AFTER_S,
    )


def load_error(residency: Residency) -> LoadFailed:
    """Turns what a node reported of a FAILED residency into the error of the call that waited for it."""
    failure = residency.failure
    reason = failure.reason if failure is not None else "LOAD_FAILED"
    message = failure.message if failure is not None else "the node gave no reason; see its log"
    kind = {"DEVICE_OOM": DeviceOom, "RUNNER_LOST": RunnerLost}.get(reason, LoadFailed)
    return kind(
        f"model {residency.model_id!r} could not be loaded: {message}",
        metadata={
            "node_reason": reason,
            "estimated_bytes": str(residency.reserved_bytes),
            "measured_bytes": str(residency.measured_bytes),
        },
        retry_after_s=1.0 if kind is RunnerLost else None,
        resource=("model", residency.model_id),
    )


def _holders(occupant: Occupant) -> list[str]:
    if occupant.holders:
        return [f"{holder or 'someone'} ({occupant.model_id})" for holder in occupant.holders]
    if occupant.pinned:
        return [f"a pin ({occupant.model_id})"]
    if occupant.state is ResidencyState.RESIDENT and not occupant.n_waiters:
        return []
    return [f"{occupant.state.lower()} {occupant.model_id}"]
