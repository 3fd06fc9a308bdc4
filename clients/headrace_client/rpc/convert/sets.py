"""Between messages about activation sets and values."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.registry.v1 import activation_set_service_pb2 as sets_pb
from headrace_client.rpc.convert.common import time_from_pb
from headrace_client.values import ActivationSet, SetPin


def set_from_pb(pb: sets_pb.ActivationSet) -> ActivationSet:
    """Reads one node's copy of a set."""
    return ActivationSet(
        id=pb.id,
        node_id=pb.node_id,
        model_id=pb.model_id,
        corpus_id=pb.corpus_id,
        columns=tuple(pb.columns),
        n_rows=pb.n_rows,
        size_bytes=pb.size_bytes,
        complete=pb.complete,
        retention=pb.retention,
        path=pb.path,
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        last_used_time=time_from_pb(pb, "last_used_time"),
        pins=tuple(
            SetPin(owner=pin.owner, reason=pin.reason, expire_time=time_from_pb(pin, "expire_time")) for pin in pb.pins
        ),
        holders=tuple(pb.holders),
        deleting=pb.deleting,
    )


def pin_fields(set_id: str, owner: str, reason: str, expire_time: datetime | None) -> dict[str, Any]:
    """Fields of PinActivationSetRequest. A time without a zone is local."""
    fields: dict[str, Any] = {"set_id": set_id, "owner": owner, "reason": reason}
    if expire_time is None:
        return fields
    stamp = Timestamp()
    stamp.FromDatetime(expire_time.astimezone(UTC))
    return fields | {"expire_time": stamp}
