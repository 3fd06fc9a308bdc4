"""The messages of StreamActivations behind its header, serialized: chunks of rows are framed by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from headrace.extractor.v1 import extraction_pb2, extraction_service_pb2
from headrace_chassis.metrics import Metrics
from headrace_extractor.reading.row_stream import End, Pause, RowStream
from headrace_log.frames import encode_chunk
from headrace_log.reader import RowRun

STREAM_METHOD = "/headrace.extractor.v1.ExtractionService/StreamActivations"


async def framed_rows(stream: RowStream, metrics: Metrics) -> AsyncGenerator[bytes, None]:
    """Yields a message for each event of a stream."""
    ordered = bool(stream.block_rows)
    async with aclosing(stream.events()) as events:
        async for event in events:
            if isinstance(event, RowRun):
                place = stream.next_row if ordered else 0
                message = encode_chunk(event.first_row, event.n_rows, event.columns, place)
                metrics.sent(STREAM_METHOD, len(message), event.n_rows)
                yield message
            else:
                yield _marker_to_bytes(event)


def _marker_to_bytes(event: Pause | End) -> bytes:
    if isinstance(event, Pause):
        state = extraction_pb2.ExtractionState.Value(f"EXTRACTION_STATE_{event.state}")
        progress = extraction_service_pb2.StreamProgress(n_rows=event.n_rows, state=state)
        return extraction_service_pb2.StreamActivationsResponse(progress=progress).SerializeToString()
    end = extraction_service_pb2.StreamEnd(next_row=event.next_row, n_rows=event.n_rows)
    return extraction_service_pb2.StreamActivationsResponse(end=end).SerializeToString()


async def one_ahead(messages: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Makes each message while gRPC sends the message before it."""

    async def following() -> bytes | None:
        return await anext(messages, None)

    made = asyncio.create_task(following())
    try:
        while (message := await made) is not None:
            made = asyncio.create_task(following())
            yield message
    finally:
        made.cancel()
        await asyncio.gather(made, return_exceptions=True)
