"""A caller's wish for a model on a device, the residency that serves it, and how the wait for its lease stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_registry.models.models import Failure
from headrace_registry.residency.leases import Lease
from headrace_registry.residency.residency import Residency

# A node's id and the id of one of its devices.
DeviceKey = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A model wanted on a device. Empty `node_id` or `device_id`: the registry chooses."""

    model_id: str
    node_id: str = ""
    device_id: str = ""
    actor: str
    if_resident_only: bool = False

    def allows(self, node_id: str, device_id: str) -> bool:
        """True if the model may go to this device."""
        return self.node_id in ("", node_id) and self.device_id in ("", device_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The residency that will serve a wish; `changed` if placing it changed any residency."""

    residency: Residency
    changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseProgress:
    """How an AcquireLease stands: it has its lease, or waits for a residency at a position in the queue."""

    residency: Residency | None = None
    # 1 for the first in the device's queue; 0 once the residency has left the queue.
    position: int = 0
    lease: Lease | None = None
    # Devices where this call has seen the load fail: the model is placed on another one if there is any.
    avoid: Mapping[DeviceKey, Failure] = field(default_factory=dict)
    # Loads that were ended from outside while this call waited for them.
    n_interrupted: int = 0
