"""Between messages of streams and values."""

from __future__ import annotations

from headrace.common.v1 import dtype_pb2
from headrace.extractor.v1 import extraction_service_pb2 as extractions_pb
from headrace_client import values as v
from headrace_client.rpc.convert.enums import name_of


def header_from_pb(pb: extractions_pb.StreamHeader) -> v.StreamHeader:
    """Reads the header of a stream. Raises InvalidArgument for a dtype that this client does not know."""
    return v.StreamHeader(
        set_id=pb.set_id,
        columns=tuple(_column_from_pb(column) for column in pb.columns),
        first_row=pb.first_row,
        end_row=pb.end_row,
        reader=pb.reader,
        statistics=tuple(_statistics_from_pb(one) for one in pb.statistics),
        path=pb.path,
        mapped=pb.transport == extractions_pb.TRANSPORT_MAPPED,
        nonce=pb.nonce,
        block_rows=pb.block_rows,
    )


def _column_from_pb(pb: extractions_pb.Column) -> v.Column:
    name = name_of(dtype_pb2.Dtype, pb.dtype).removeprefix("DTYPE_").lower()
    return v.Column(
        name=pb.name,
        dtype=v.choice(v.Dtype, name, "dtype"),
        width=pb.width,
        scale_column=pb.scale_column,
        shape=tuple(pb.shape),
    )


def _statistics_from_pb(pb: extractions_pb.ColumnStatistics) -> v.ColumnStatistics:
    return v.ColumnStatistics(
        name=pb.name,
        count=pb.count,
        mean=tuple(pb.mean),
        m2=tuple(pb.m2),
        mean_norm=pb.mean_norm,
        mean_squared_norm=pb.mean_squared_norm,
    )


def stream_event_from_pb(message: bytes) -> extractions_pb.StreamActivationsResponse:
    """Parses a message of a stream that is not a chunk framed as one field."""
    return extractions_pb.StreamActivationsResponse.FromString(message)
