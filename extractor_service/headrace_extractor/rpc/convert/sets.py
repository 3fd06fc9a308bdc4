"""Messages about activation sets to values and back."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.registry.v1 import activation_set_service_pb2 as pb
from headrace_extractor.sets.notes import HeldSet, SetOrders


def held_set_to_pb(held: HeldSet, node_id: str) -> pb.ActivationSet:
    """A set on this node, as the registry is told of it."""
    last_used = Timestamp()
    last_used.FromNanoseconds(round(held.last_used * 1e9))
    return pb.ActivationSet(
        id=held.id,
        node_id=node_id,
        model_id=held.model_id,
        corpus_id=held.corpus_id,
        columns=held.columns,
        n_rows=held.n_rows,
        size_bytes=held.size_bytes,
        complete=held.complete,
        retention=held.retention,
        path=held.path,
        last_used_time=last_used if held.last_used else None,
        holders=held.holders,
        identity_json=held.identity_json,
    )


def answer_from_pb(message: pb.ReportActivationSetResponse) -> SetOrders:
    """The orders in the answer to a report."""
    until = message.pinned_until.ToNanoseconds() / 1e9 if message.HasField("pinned_until") else None
    return SetOrders(pinned=message.pinned, pinned_until=until, delete=message.delete)


def orders_from_pb(message: pb.ActivationSet) -> SetOrders:
    """The orders about a listed set."""
    ends = [pin.expire_time.ToNanoseconds() / 1e9 for pin in message.pins if pin.HasField("expire_time")]
    for_ever = len(ends) < len(message.pins)
    return SetOrders(
        pinned=bool(message.pins),
        pinned_until=None if for_ever or not ends else max(ends),
        delete=message.deleting,
    )
