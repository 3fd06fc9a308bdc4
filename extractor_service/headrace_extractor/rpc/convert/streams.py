"""StreamActivations' request and header."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_service_pb2 as pb
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.reading.reading_order import OrderRequest, ReadOrder
from headrace_extractor.reading.row_stream import RowStream, StreamRequest
from headrace_extractor.rpc.convert import extractions as convert
from headrace_extractor.rpc.convert.statistics import statistics_to_pb

_ORDERS = {
    pb.READ_ORDER_UNSPECIFIED: ReadOrder.SEQUENTIAL,
    pb.READ_ORDER_SEQUENTIAL: ReadOrder.SEQUENTIAL,
    pb.READ_ORDER_SHUFFLED: ReadOrder.SHUFFLED,
}


def stream_request_from_pb(message: pb.StreamActivationsRequest) -> StreamRequest:
    """Raises FieldInvalid."""
    if message.order not in _ORDERS:
        raise FieldInvalid(f"order {message.order} is none that this version knows.", field="order")
    if message.transport not in pb.Transport.values():
        raise FieldInvalid(f"transport {message.transport} is none that this version knows.", field="transport")
    return StreamRequest(
        start_row=message.start_row,
        end_row=message.end_row,
        columns=tuple(message.columns),
        chunk_bytes=message.chunk_bytes,
        allow_large_chunks=message.allow_large_chunks,
        reader=message.reader,
        explicit_release=message.explicit_release,
        mapped=message.transport == pb.TRANSPORT_MAPPED,
        order=OrderRequest(
            order=_ORDERS[message.order],
            seed=message.seed,
            epoch=message.epoch,
            shard_index=message.shard_index,
            shard_count=message.shard_count,
            block_rows=message.block_rows,
        ),
    )


def header_to_bytes(job: ExtractionJob, stream: RowStream) -> bytes:
    """The first message of a stream, serialized."""
    header = pb.StreamHeader(
        set_id=job.value.set_id,
        columns=[convert.column_to_pb(column) for column in stream.set_reader.columns],
        first_row=stream.next_row,
        end_row=stream.end_row,
        reader=stream.name,
        path=str(job.folder),
        transport=pb.TRANSPORT_MAPPED if stream.nonce else pb.TRANSPORT_INLINE,
        nonce=stream.nonce,
        block_rows=stream.block_rows,
        statistics=statistics_to_pb(job.folder, stream.set_reader.columns),
    )
    return pb.StreamActivationsResponse(header=header).SerializeToString()
