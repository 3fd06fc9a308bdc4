"""Converts values that several messages have: times and transfers."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.common.v1 import transfer_pb2
from headrace_extractor.meters import Transfer


def transfer_to_pb(transfer: Transfer | None) -> transfer_pb2.Transfer | None:
    """How far a transfer is."""
    if transfer is None:
        return None
    return transfer_pb2.Transfer(
        done_bytes=transfer.done_bytes,
        total_bytes=transfer.total_bytes,
        percent=transfer.percent,
        rate_bytes_per_s=transfer.rate_bytes_per_s,
        eta_s=transfer.eta_s,
    )


def transfer_from_pb(message: transfer_pb2.Transfer) -> Transfer:
    """Inverse of `transfer_to_pb`."""
    return Transfer(
        done_bytes=message.done_bytes, total_bytes=message.total_bytes, rate_bytes_per_s=message.rate_bytes_per_s
    )


def timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970 as a Timestamp."""
    result = Timestamp()
    result.FromNanoseconds(int(seconds * 1e9))
    return result
