"""What a caller wants of residency, and how that stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_registry.models.models import Failure
from headrace_registry.residency.leases import Lease
from headrace_registry.residency.residency import Residency

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
        """Whether the model may be there."""
        return self.node_id in ("", node_id) and self.device_id in ("", device_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The residency that will serve a wish, and whether others should look again."""

    residency: Residency
    changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseProgress:
    """How a wish stands: a lease, or the residency it waits for and its place in the queue (0 once loading).

    `avoid` are the places where it failed on the way.
    """

    residency: Residency | None = None
    position: int = 0
    lease: Lease | None = None
    avoid: Mapping[DeviceKey, Failure] = field(default_factory=dict)
