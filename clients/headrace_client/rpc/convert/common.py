"""Between messages and values of several kinds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.common.v1 import dtype_pb2, transfer_pb2
from headrace_client import values as v
from headrace_client.rpc.convert.enums import choice_of


def time_from_pb(message: Any, field: str) -> datetime | None:
    """Reads a field that holds a time; None if it is not set."""
    if not message.HasField(field):
        return None
    stamp: Timestamp = getattr(message, field)
    return stamp.ToDatetime(tzinfo=UTC)


def transfer_from_pb(message: Any) -> v.Transfer | None:
    """Reads the field `transfer`; None if it is not set."""
    if not message.HasField("transfer"):
        return None
    pb: transfer_pb2.Transfer = message.transfer
    return v.Transfer(
        done_bytes=pb.done_bytes,
        total_bytes=pb.total_bytes or None,
        percent=pb.percent if pb.total_bytes else None,
        rate_bytes_per_s=pb.rate_bytes_per_s or None,
        eta_s=pb.eta_s if pb.eta_s >= 0 and pb.total_bytes else None,
    )


def failure_from_pb(message: Any) -> v.Failure | None:
    """Reads the field `failure`; None if it is not set."""
    if not message.HasField("failure"):
        return None
    pb = message.failure
    return v.Failure(reason=pb.reason, message=pb.message, metadata=dict(getattr(pb, "metadata", {})))


def dtype_from_pb(number: int, default: v.Dtype) -> v.Dtype:
    """Reads a dtype; `default` for a number that this client does not know."""
    return choice_of(dtype_pb2.Dtype, "DTYPE_", number, v.Dtype, default)
