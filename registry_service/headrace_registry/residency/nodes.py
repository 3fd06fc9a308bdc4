"""Nodes and their devices, and the announcements and heartbeats by which nodes describe themselves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_id, checked_text

# A node that misses three heartbeats in a row is silent, not late.
MISSED_HEARTBEATS = 3
_MAX_DEVICES = 64
_MAX_LIMIT = 10_000


class DeviceKind(StrEnum):
    """The kind of memory a model is loaded into."""

    CPU = "CPU"
    CUDA = "CUDA"
    MPS = "MPS"


class NodeState(StrEnum):
    """LOST once the registry has not heard from a node for too long."""

    ALIVE = "ALIVE"
    LOST = "LOST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU of a node, or its CPU; sizes in bytes."""

    id: str
    kind: DeviceKind
    name: str
    capacity_bytes: int
    free_bytes: int = 0
    reserved_bytes: int = 0
    total_bytes: int = 0
    # Not given back by unloads; counts as held until the node reports it free.
    lost_bytes: int = 0
    capability: str = ""
    flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that runs one extractor."""

    id: str
    address: str
    epoch: int
    state: NodeState
    version: str
    heartbeat_time: datetime
    devices: tuple[Device, ...] = ()
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    # Bytes a runner takes on a device before it holds weights; 0 while not measured.
    runtime_bytes: int = 0
    # 0: no limit.
    max_loads: int = 0
    max_residents: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The contents of a RegisterNode, checked."""

    node_id: str
    address: str
    version: str
    boot_nonce: str
    devices: tuple[Device, ...]
    memory_bytes: int = 0
    runtime_bytes: int = 0
    max_loads: int = 0
    max_residents: int = 0

    def __post_init__(self) -> None:
        checked_id(self.node_id, field="node_id")
        checked_address(self.address)
        checked_text(self.version, field="version")
        checked_text(self.boot_nonce, field="boot_nonce")
        if not self.boot_nonce:
            raise FieldInvalid("boot_nonce", "send a random string drawn once per start")
        if not 1 <= len(self.devices) <= _MAX_DEVICES:
            raise FieldInvalid("devices", f"announce 1 to {_MAX_DEVICES} devices; the CPU is one")
        if len({device.id for device in self.devices}) != len(self.devices):
            raise FieldInvalid("devices", "two devices have the same id")
        for device in self.devices:
            _check_device(device)
        for field in ("memory_bytes", "runtime_bytes"):
            checked_bytes(getattr(self, field), field=field)
        for field in ("max_loads", "max_residents"):
            if not 0 <= getattr(self, field) <= _MAX_LIMIT:
                raise FieldInvalid(field, f"must be 0 (no limit) to {_MAX_LIMIT}")


def is_other_node(nonce: str, other: str) -> bool:
    """True if two boot nonces are of nodes with different data folders, and not of two starts of one node.

    A nonce without a dot does not tell its folder.
    """
    folders = [each.partition(".")[0] if "." in each else "" for each in (nonce, other)]
    return all(folders) and folders[0] != folders[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """The contents of a Heartbeat, checked."""

    # Of each device its id, its free bytes and its lost bytes.
    devices: tuple[tuple[str, int, int], ...]
    memory_free_bytes: int = 0
    runtime_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.devices) > _MAX_DEVICES:
            raise FieldInvalid("devices", f"report on {_MAX_DEVICES} devices at most, those that were announced")
        for device_id, _, lost_bytes in self.devices:
            checked_text(device_id, field="devices.id", max_length=63)
            checked_bytes(lost_bytes, field="devices.lost_bytes")
        checked_bytes(self.memory_free_bytes, field="memory_free_bytes")
        checked_bytes(self.runtime_bytes, field="runtime_bytes")


def checked_bytes(n_bytes: int, *, field: str) -> int:
    """Checks that a number of bytes is not negative."""
    if n_bytes < 0:
        raise FieldInvalid(field, "must not be negative")
    return n_bytes


def checked_address(address: str) -> str:
    """Checks that an address is a `host:port` or `unix:path` that clients can dial."""
    if address.startswith(("unix:", "unix-abstract:")) and not address.endswith(":") and len(address) <= 255:
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536 or len(address) > 255:
        raise FieldInvalid("address", f"{address[:80]!r} is no host:port")
    if host in ("0.0.0.0", "[::]"):  # noqa: S104 - compared, not bound.
        raise FieldInvalid("address", f"{address!r} stands for every interface; give the one that clients reach")
    return address


def _check_device(device: Device) -> None:
    checked_text(device.id, field="devices.id", max_length=63)
    checked_text(device.name, field="devices.name")
    if not device.id:
        raise FieldInvalid("devices.id", "empty; write `cpu`, `cuda:0` or `mps`")
    if device.capacity_bytes <= 0:
        raise FieldInvalid("devices.capacity_bytes", f"of {device.id} must be positive")
    for name in ("free_bytes", "total_bytes", "lost_bytes"):
        if getattr(device, name) < 0:
            raise FieldInvalid(f"devices.{name}", f"of {device.id} must not be negative")
    checked_text(device.capability, field="devices.capability", max_length=63)
