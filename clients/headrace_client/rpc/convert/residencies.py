"""Between messages about nodes and residencies and values."""

from __future__ import annotations

from datetime import UTC

from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace.registry.v1 import residency_service_pb2 as residencies_pb
from headrace_client import values as v
from headrace_client.rpc.convert.common import failure_from_pb, time_from_pb, transfer_from_pb
from headrace_client.rpc.convert.enums import name_of, state_of


def node_from_pb(pb: residency_pb.Node) -> v.Node:
    """Reads a node."""
    return v.Node(
        id=pb.id,
        address=pb.address,
        epoch=pb.epoch,
        state=state_of(residency_pb.NodeState, "NODE_STATE_", pb.state, v.NodeState),
        devices=tuple(_device_from_pb(device) for device in pb.devices),
        version=pb.version,
        heartbeat_time=time_from_pb(pb, "heartbeat_time"),
        memory_bytes=pb.memory_bytes,
        memory_free_bytes=pb.memory_free_bytes,
        runtime_bytes=pb.runtime_bytes,
        max_loads=pb.max_loads,
        max_residents=pb.max_residents,
    )


def _device_from_pb(pb: residency_pb.Device) -> v.Device:
    return v.Device(
        id=pb.id,
        kind=name_of(residency_pb.DeviceKind, pb.kind).removeprefix("DEVICE_KIND_").lower(),
        name=pb.name,
        capacity_bytes=pb.capacity_bytes,
        reserved_bytes=pb.reserved_bytes,
        free_bytes=pb.free_bytes,
        total_bytes=pb.total_bytes,
        lost_bytes=pb.lost_bytes,
        capability=pb.capability,
        flash_attention=pb.flash_attention,
    )


def residency_from_pb(pb: residency_pb.Residency) -> v.Residency:
    """Reads a residency."""
    return v.Residency(
        id=pb.id,
        model_id=pb.model_id,
        node_id=pb.node_id,
        device_id=pb.device_id,
        state=state_of(residency_pb.ResidencyState, "RESIDENCY_STATE_", pb.state, v.ResidencyState),
        reserved_bytes=pb.reserved_bytes,
        measured_bytes=pb.measured_bytes,
        n_leases=pb.n_leases,
        reason=pb.reason,
        actor=pb.actor,
        transfer=transfer_from_pb(pb),
        failure=failure_from_pb(pb),
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        last_used_time=time_from_pb(pb, "last_used_time"),
        queue_position=pb.queue_position,
        pinned=pb.pinned,
        holders=tuple(pb.holders),
        load_s=pb.load_s or None,
        resident_time=time_from_pb(pb, "resident_time"),
    )


def eviction_from_pb(pb: residencies_pb.EvictModelsResponse) -> v.Eviction:
    """Reads the answer of EvictModels."""
    return v.Eviction(
        residencies=tuple(residency_from_pb(one) for one in pb.residencies),
        node_id=pb.node_id,
        device_id=pb.device_id,
        free_bytes=pb.free_bytes,
    )


def residency_event_from_pb(pb: residencies_pb.WatchResidenciesResponse) -> v.ResidencyEvent | None:
    """Reads an event; None for a heartbeat."""
    if pb.heartbeat:
        return None
    return v.ResidencyEvent(
        seq=pb.seq, residency=residency_from_pb(pb.residency), snapshot=pb.snapshot, time=time_from_pb(pb, "time")
    )


def pin_from_pb(pb: residency_pb.Pin) -> v.Pin:
    """Reads a pin."""
    return v.Pin(
        model_id=pb.model_id,
        owner=pb.owner,
        node_id=pb.node_id,
        reason=pb.reason,
        expire_time=time_from_pb(pb, "expire_time"),
        create_time=time_from_pb(pb, "create_time"),
    )


def pin_to_pb(pin: v.Pin) -> residency_pb.Pin:
    """Builds the fields of a pin that PinModel reads. A time without a zone is local."""
    pb = residency_pb.Pin(model_id=pin.model_id, owner=pin.owner, node_id=pin.node_id, reason=pin.reason)
    if pin.expire_time is not None:
        pb.expire_time.FromDatetime(pin.expire_time.astimezone(UTC))
    return pb
