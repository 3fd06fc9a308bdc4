"""Converts residencies, nodes, pins and leases: `x_from_pb` checks a message from outside, `x_to_pb` is total."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.common.v1 import transfer_pb2
from headrace.registry.v1 import model_pb2, residency_pb2, residency_service_pb2
from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import clean_text
from headrace_registry.models import models as m
from headrace_registry.residency.events import ResidencyEvent
from headrace_registry.residency.leases import Lease
from headrace_registry.residency.nodes import Device, DeviceKind, Node, NodeState
from headrace_registry.residency.pins import Pin
from headrace_registry.residency.residency import Residency, ResidencyState

T = TypeVar("T")

_RESIDENCY_STATES = {s: residency_pb2.ResidencyState.Value(f"RESIDENCY_STATE_{s}") for s in ResidencyState}
_DEVICE_KINDS = {kind: residency_pb2.DeviceKind.Value(f"DEVICE_KIND_{kind}") for kind in DeviceKind}
_NODE_STATES = {state: residency_pb2.NodeState.Value(f"NODE_STATE_{state}") for state in NodeState}

_RESIDENCY_STATE_FROM: dict[int, ResidencyState] = {number: value for value, number in _RESIDENCY_STATES.items()}
_DEVICE_KIND_FROM = {number: value for value, number in _DEVICE_KINDS.items()}


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def fill_time(stamp: Timestamp, value: datetime) -> None:
    """Writes an aware datetime into a message's field."""
    since = value - _EPOCH  # Four times as fast as FromDatetime, which shows in pages of a thousand models.
    stamp.seconds = since.days * 86_400 + since.seconds
    stamp.nanos = since.microseconds * 1000


def time_to_pb(value: datetime) -> Timestamp:
    """Converts an aware datetime."""
    stamp = Timestamp()
    fill_time(stamp, value)
    return stamp


def transfer_to_pb(transfer: m.Transfer) -> transfer_pb2.Transfer:
    """Total."""
    return transfer_pb2.Transfer(
        done_bytes=transfer.done_bytes,
        total_bytes=transfer.total_bytes,
        percent=transfer.percent,
        rate_bytes_per_s=transfer.rate_bytes_per_s,
        eta_s=transfer.eta_s,
    )


def transfer_from_pb(message: transfer_pb2.Transfer) -> m.Transfer:
    """Takes a node's numbers as they are, but for NaN and infinity."""
    return m.Transfer(
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
        percent=finite(message.percent),
        rate_bytes_per_s=finite(message.rate_bytes_per_s),
        eta_s=finite(message.eta_s),
    )


def failure_to_pb(failure: m.Failure) -> model_pb2.Failure:
    """Total."""
    return model_pb2.Failure(reason=failure.reason, message=failure.message)


def failure_from_pb(message: model_pb2.Failure) -> m.Failure:
    """Cuts reason and message to a length worth keeping."""
    return m.Failure(
        reason=clean_text(message.reason, 63),
        message=clean_text(message.message, 2000),
        interrupted=message.interrupted,
    )


def device_from_pb(message: residency_pb2.Device) -> Device:
    """Checks the kind only: the rest is checked by the Announcement that the device is part of."""
    kind = _DEVICE_KIND_FROM.get(message.kind)
    if kind is None:
        raise FieldInvalid("devices.kind", f"of {message.id!r} is missing or unknown")
    return Device(
        id=message.id,
        kind=kind,
        name=message.name,
        capacity_bytes=message.capacity_bytes,
        free_bytes=message.free_bytes,
        total_bytes=message.total_bytes,
        lost_bytes=message.lost_bytes,
        capability=message.capability,
        flash_attention=message.flash_attention,
    )


def device_to_pb(device: Device) -> residency_pb2.Device:
    """Total."""
    return residency_pb2.Device(
        id=device.id,
        kind=_DEVICE_KINDS[device.kind],
        name=device.name,
        capacity_bytes=device.capacity_bytes,
        reserved_bytes=device.reserved_bytes,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        lost_bytes=device.lost_bytes,
        capability=device.capability,
        flash_attention=device.flash_attention,
    )


def node_to_pb(node: Node) -> residency_pb2.Node:
    """Total."""
    return residency_pb2.Node(
        id=node.id,
        address=node.address,
        epoch=node.epoch,
        state=_NODE_STATES[node.state],
        devices=[device_to_pb(device) for device in node.devices],
        version=node.version,
        heartbeat_time=time_to_pb(node.heartbeat_time),
        memory_bytes=node.memory_bytes,
        memory_free_bytes=node.memory_free_bytes,
        runtime_bytes=node.runtime_bytes,
        max_loads=node.max_loads,
        max_residents=node.max_residents,
    )


def residency_state_from_pb(value: int) -> ResidencyState:
    """Checks that a node may report the state."""
    state = _RESIDENCY_STATE_FROM.get(value)
    reportable = (
        ResidencyState.LOADING,
        ResidencyState.RESIDENT,
        ResidencyState.UNLOADED,
        ResidencyState.FAILED,
    )
    if state is None or state not in reportable:
        raise FieldInvalid("state", f"report one of {', '.join(reportable)}")
    return state


def residency_to_pb(residency: Residency) -> residency_pb2.Residency:
    """Total."""
    return residency_pb2.Residency(
        id=residency.id,
        model_id=residency.model_id,
        node_id=residency.node_id,
        device_id=residency.device_id,
        state=_RESIDENCY_STATES[residency.state],
        reserved_bytes=residency.reserved_bytes,
        measured_bytes=residency.measured_bytes,
        fence=residency.fence,
        node_epoch=residency.node_epoch,
        n_leases=residency.n_leases,
        reason=residency.reason,
        actor=residency.actor,
        transfer=transfer_to_pb(residency.transfer) if residency.transfer else None,
        failure=failure_to_pb(residency.failure) if residency.failure else None,
        create_time=time_to_pb(residency.create_time),
        update_time=time_to_pb(residency.update_time),
        last_used_time=time_to_pb(residency.last_used_time),
        queue_position=residency.queue_position,
        pinned=residency.pinned,
        holders=residency.holders,
        load_s=residency.load_s,
        resident_time=time_to_pb(residency.resident_time) if residency.resident_time else None,
    )


def residency_event_to_pb(event: ResidencyEvent) -> residency_service_pb2.WatchResidenciesResponse:
    """Total."""
    return residency_service_pb2.WatchResidenciesResponse(
        seq=event.seq,
        time=time_to_pb(event.time),
        residency=residency_to_pb(event.residency),
        snapshot=event.snapshot,
    )


def pin_from_pb(message: residency_pb2.Pin) -> Pin:
    """Checks a pin; leaves out the fields that are output only."""
    return Pin(
        model_id=message.model_id,
        node_id=message.node_id,
        owner=message.owner,
        reason=message.reason,
        expire_time=time_from_pb(message.expire_time, field="pin.expire_time")
        if message.HasField("expire_time")
        else None,
    )


def pin_to_pb(pin: Pin) -> residency_pb2.Pin:
    """Total."""
    return residency_pb2.Pin(
        model_id=pin.model_id,
        node_id=pin.node_id,
        owner=pin.owner,
        reason=pin.reason,
        expire_time=time_to_pb(pin.expire_time) if pin.expire_time else None,
        create_time=time_to_pb(pin.create_time) if pin.create_time else None,
    )


def lease_to_pb(lease: Lease) -> residency_pb2.Lease:
    """Total."""
    return residency_pb2.Lease(
        id=lease.id,
        residency_id=lease.residency_id,
        model_id=lease.model_id,
        holder=lease.holder,
        fence=lease.fence,
        ttl_s=lease.ttl_s,
        expire_time=time_to_pb(lease.expire_time),
        node_id=lease.node_id,
        node_address=lease.node_address,
    )


def finite(value: float) -> float:
    """Returns 0 for NaN and infinity, which JSON columns can't store."""
    return value if abs(value) < 1e300 else 0.0


def time_from_pb(stamp: Timestamp, *, field: str) -> datetime:
    """Converts a time that Postgres can store. Raises FieldInvalid."""
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as exc:
        raise FieldInvalid(field, "is no time between the years 1 and 9999") from exc
