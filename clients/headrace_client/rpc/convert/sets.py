"""Between messages about activation sets and values."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.extractor.v1 import extraction_service_pb2 as extraction_pb
from headrace.registry.v1 import activation_set_service_pb2 as sets_pb
from headrace_client.rpc.convert.common import time_from_pb
from headrace_client.values import ActivationSet, DamagedRows, SetPin, SetVerification


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
        identity=json.loads(pb.identity_json) if pb.identity_json else {},
    )


def verification_from_pb(pb: extraction_pb.VerifySetResponse, set_id: str, node_id: str) -> SetVerification:
    """Reads how far a node's verification is."""
    return SetVerification(
        set_id=set_id,
        node_id=node_id,
        n_files=pb.n_files,
        n_files_total=pb.n_files_total,
        size_bytes=pb.size_bytes,
        total_bytes=pb.total_bytes,
        n_damaged=pb.n_damaged,
        damages=tuple(
            DamagedRows(
                file=each.file,
                column=each.column,
                first_row=each.first_row,
                end_row=each.end_row or None,
                message=each.message,
            )
            for each in pb.damages
        ),
        done=pb.done,
    )


def pin_fields(set_id: str, owner: str, reason: str, expire_time: datetime | None) -> dict[str, Any]:
    """Fields of PinActivationSetRequest. A time without a zone is local."""
    fields: dict[str, Any] = {"set_id": set_id, "owner": owner, "reason": reason}
    if expire_time is None:
        return fields
    stamp = Timestamp()
    stamp.FromDatetime(expire_time.astimezone(UTC))
    return fields | {"expire_time": stamp}
