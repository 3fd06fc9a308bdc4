"""Decides which idle models leave a device so that an operator finds so many bytes free. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.residency import Occupant, ResidencyState
from headrace_registry.residency.scheduling import DeviceView, NodeView, choose_victims

# Bytes are wanted where models run fastest.
_KIND_RANK = {DeviceKind.CUDA: 0, DeviceKind.MPS: 1, DeviceKind.CPU: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """One device, and the models that leave it; `free_bytes` are free there once they have left.

    `in_the_way` are the leased, pinned or loading models there, if bytes are still missing. Lost bytes and those of
    validations may be missing without any.
    """

    node_id: str
    device: DeviceView
    victims: tuple[Occupant, ...]
    free_bytes: int
    is_enough: bool
    in_the_way: tuple[Occupant, ...] = ()


def decide_eviction(nodes: Sequence[NodeView], wanted_bytes: int, *, device_id: str = "") -> Eviction | None:
    """Chooses the device where the fewest bytes have to leave, among the large enough ones of the best kind.

    Models leave by least recent use, none that is leased, waited for, pinned or not loaded yet. None if every device is
    smaller than `wanted_bytes`. If no device can have so many free, the answer is of the one that comes closest, and
    has no victims.
    """
    allowed = [
        (node, device)
        for node in nodes
        for device in node.devices
        if device_id in ("", device.id) and device.capacity_bytes >= wanted_bytes
    ]
    best_kind = min((_KIND_RANK[device.kind] for _, device in allowed), default=0)
    found = [_of(node, device, wanted_bytes) for node, device in allowed if _KIND_RANK[device.kind] == best_kind]
    return min(found, key=_rank, default=None)


def _of(node: NodeView, device: DeviceView, wanted_bytes: int) -> Eviction:
    here = [o for o in node.occupants if o.device_id == device.id and o.state.holds_memory]
    going = [o for o in here if o.state is ResidencyState.UNLOADING]
    idle = [o for o in here if o.state is ResidencyState.RESIDENT and not o.in_use and not o.pinned]
    staying = [o for o in here if o not in going]
    free_bytes = device.capacity_bytes - device.lost_bytes - sum(o.reserved_bytes for o in staying)
    missing = wanted_bytes - free_bytes
    victims = choose_victims(idle, missing) if missing > 0 else ()
    freed = sum(o.reserved_bytes for o in victims)
    is_enough = freed >= missing
    return Eviction(
        node_id=node.id,
        device=device,
        victims=victims,
        free_bytes=free_bytes + freed,
        is_enough=is_enough,
        in_the_way=() if is_enough else tuple(o for o in staying if o not in idle),
    )


def _rank(eviction: Eviction) -> tuple[bool, int, int, str, str]:
    """Devices with enough bytes come first, those that give up least before others; ids only for a stable order."""
    given_up = sum(o.reserved_bytes for o in eviction.victims)
    return not eviction.is_enough, given_up, -eviction.free_bytes, eviction.node_id, eviction.device.id
