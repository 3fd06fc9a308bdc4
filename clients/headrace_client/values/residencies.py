"""Nodes, their devices, and the models loaded there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from headrace_client.values.common import Failure, Transfer
from headrace_client.values.listing import Shown


class ResidencyState(StrEnum):
    """The state of one model on one device."""

    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RESIDENT = "RESIDENT"
    DRAINING = "DRAINING"
    UNLOADING = "UNLOADING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"


class NodeState(StrEnum):
    """Whether the registry hears from a node."""

    ALIVE = "ALIVE"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Device(Shown):
    """One GPU of a node, or its CPU; sizes in bytes."""

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "name", "capacity_bytes", "free_bytes")

    id: str
    kind: str
    name: str
    capacity_bytes: int
    reserved_bytes: int
    free_bytes: int
    total_bytes: int = 0
    lost_bytes: int = 0
    capability: str = ""
    flash_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Node(Shown):
    """A machine running one extractor. Bytes are 0 while unknown; a limit of 0 stands for no limit."""

    SHOWN: ClassVar[tuple[str, ...]] = ("id", "state", "address")

    id: str
    address: str
    epoch: int
    state: NodeState
    devices: tuple[Device, ...]
    version: str = ""
    heartbeat_time: datetime | None = None
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    runtime_bytes: int = 0
    max_loads: int = 0
    max_residents: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Residency(Shown):
    """One model on one device of one node. Its load took `load_s` and was over at `resident_time`."""

    SHOWN: ClassVar[tuple[str, ...]] = ("model_id", "node_id", "device_id", "state", "reserved_bytes")

    id: str
    model_id: str
    node_id: str
    device_id: str
    state: ResidencyState
    reserved_bytes: int
    measured_bytes: int
    n_leases: int
    reason: str = ""
    actor: str = ""
    transfer: Transfer | None = None
    failure: Failure | None = None
    create_time: datetime | None = None
    update_time: datetime | None = None
    last_used_time: datetime | None = None
    queue_position: int = 0
    pinned: bool = False
    holders: tuple[str, ...] = ()
    load_s: float | None = None
    resident_time: datetime | None = None

    @property
    def ended(self) -> bool:
        """True once the state is final."""
        return self.state in (ResidencyState.UNLOADED, ResidencyState.FAILED, ResidencyState.LOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """The models that leave a device; `free_bytes` are free there once they are gone."""

    residencies: tuple[Residency, ...]
    node_id: str
    device_id: str
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyEvent:
    """A residency as it was after something happened to it.

    With `snapshot` it is one of the present residencies: at the beginning, and again where events were missed for good.
    All events of a snapshot but the last have `seq` 0: a watch that goes on from there gets the whole snapshot again.
    """

    seq: int
    residency: Residency
    snapshot: bool = False
    time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Pin(Shown):
    """An owner's wish that a model stays resident, on one node or on any (an empty `node_id`)."""

    SHOWN: ClassVar[tuple[str, ...]] = ("model_id", "owner", "node_id", "expire_time")

    model_id: str
    owner: str
    node_id: str = ""
    reason: str = ""
    expire_time: datetime | None = None
    create_time: datetime | None = None
