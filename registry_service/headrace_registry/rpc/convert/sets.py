"""Between messages about activation sets and values: `x_from_pb` checks values from outside, `x_to_pb` is total."""

from __future__ import annotations

from headrace.registry.v1 import activation_set_service_pb2 as pb
from headrace_registry.models.sets import ActivationSet, SetOrders, SetPin, SetReport
from headrace_registry.rpc.convert.residencies import time_from_pb, time_to_pb


def set_report_from_pb(message: pb.ActivationSet, *, node_id: str) -> SetReport:
    """Reads a node's report of a set. The node is the caller, whatever `node_id` the message names."""
    used = message.HasField("last_used_time")
    return SetReport(
        id=message.id,
        node_id=node_id,
        model_id=message.model_id,
        corpus_id=message.corpus_id,
        columns=tuple(message.columns),
        n_rows=message.n_rows,
        size_bytes=message.size_bytes,
        complete=message.complete,
        retention=message.retention,
        path=message.path,
        last_used_time=time_from_pb(message.last_used_time, field="set.last_used_time") if used else None,
        holders=tuple(message.holders),
        identity_json=message.identity_json,
    )


def set_to_pb(held: ActivationSet, *, in_full: bool = False) -> pb.ActivationSet:
    """Total. Only a set `in_full` has its identity, which would make pages of sets large."""
    report = held.report
    return pb.ActivationSet(
        id=report.id,
        node_id=report.node_id,
        model_id=report.model_id,
        corpus_id=report.corpus_id,
        columns=report.columns,
        n_rows=report.n_rows,
        size_bytes=report.size_bytes,
        complete=report.complete,
        retention=report.retention,
        path=report.path,
        create_time=time_to_pb(held.create_time),
        update_time=time_to_pb(held.update_time),
        last_used_time=time_to_pb(report.last_used_time) if report.last_used_time else None,
        pins=[set_pin_to_pb(pin) for pin in held.pins],
        holders=report.holders,
        deleting=held.deleting,
        identity_json=report.identity_json if in_full else "",
    )


def set_pin_to_pb(pin: SetPin) -> pb.SetPin:
    """Total."""
    return pb.SetPin(
        owner=pin.owner, reason=pin.reason, expire_time=time_to_pb(pin.expire_time) if pin.expire_time else None
    )


def set_pin_from_pb(message: pb.PinActivationSetRequest) -> SetPin:
    """Reads a pin; the pin checks its fields itself."""
    ends = message.HasField("expire_time")
    return SetPin(
        set_id=message.set_id,
        owner=message.owner,
        reason=message.reason,
        expire_time=time_from_pb(message.expire_time, field="expire_time") if ends else None,
    )


def orders_to_pb(orders: SetOrders) -> pb.ReportActivationSetResponse:
    """Total."""
    return pb.ReportActivationSetResponse(
        pinned=orders.pinned,
        pinned_until=time_to_pb(orders.pinned_until) if orders.pinned_until else None,
        delete=orders.delete,
    )
