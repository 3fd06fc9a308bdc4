"""ExtractionService: check, call the core, fill the answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from headrace.extractor.v1 import extraction_service_pb2, extraction_service_pb2_grpc
from headrace_chassis.metrics import Metrics
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.watch import watch
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.extractions.extractions import Extractions
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.reading.row_stream import RowStream
from headrace_extractor.rpc.convert import extractions as convert
from headrace_extractor.rpc.convert import hookpoints as convert_hookpoint
from headrace_extractor.rpc.convert.streams import header_to_bytes, stream_request_from_pb
from headrace_extractor.rpc.pages import of_a_page, offset_of, page_size, token_for
from headrace_extractor.rpc.row_messages import framed_rows, one_ahead

MAX_TOKEN_IDS = 100_000
# Progress is for people; ten a second is smooth.
WATCH_INTERVAL_S = 0.1
# The runner ends its pass between two batches, which takes a second or so.
CANCEL_WAIT_S = 10.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ExtractionServicer(extraction_service_pb2_grpc.ExtractionServiceServicer):
    """Serves the extractions of this node."""

    def __init__(
        self,
        extractions: Extractions,
        *,
        decode_tokens: Callable[[str, Sequence[int]], Awaitable[list[str]]],
        metrics: Metrics,
        shutdown: Shutdown,
    ) -> None:
        self._extractions = extractions
        self._decode_tokens = decode_tokens
        self._metrics = metrics
        self._shutdown = shutdown

    async def EstimateExtraction(
        self, request: extraction_service_pb2.EstimateExtractionRequest, context: Context
    ) -> extraction_service_pb2.EstimateExtractionResponse:
        estimate = await self._extractions.estimate(convert.spec_from_pb(request.spec))
        return extraction_service_pb2.EstimateExtractionResponse(
            n_rows=estimate.n_rows,
            size_bytes=estimate.size_bytes,
            seconds=estimate.seconds,
            n_tokens=estimate.n_tokens,
            n_rows_cached=estimate.n_rows_cached,
            new_bytes=estimate.new_bytes,
            available_bytes=estimate.available_bytes,
        )

    async def StartExtraction(
        self, request: extraction_service_pb2.StartExtractionRequest, context: Context
    ) -> extraction_service_pb2.StartExtractionResponse:
        self._shutdown.check()
        value = await self._extractions.start(request.request_id, convert.spec_from_pb(request.spec))
        return extraction_service_pb2.StartExtractionResponse(extraction=convert.extraction_to_pb(value))

    async def GetExtraction(
        self, request: extraction_service_pb2.GetExtractionRequest, context: Context
    ) -> extraction_service_pb2.GetExtractionResponse:
        value = self._extractions.get(request.extraction_id).value
        return extraction_service_pb2.GetExtractionResponse(extraction=convert.extraction_to_pb(value))

    async def ListExtractions(
        self, request: extraction_service_pb2.ListExtractionsRequest, context: Context
    ) -> extraction_service_pb2.ListExtractionsResponse:
        values = [job.value for job in self._extractions.list()]
        start = offset_of(request.page_token)
        page = of_a_page(map(convert.extraction_to_pb, values[start : start + page_size(request.page_size)]))
        end = start + len(page)
        return extraction_service_pb2.ListExtractionsResponse(
            extractions=page,
            next_page_token=token_for(end) if page and end < len(values) else "",
            total_size=len(values),
        )

    async def CancelExtraction(
        self, request: extraction_service_pb2.CancelExtractionRequest, context: Context
    ) -> extraction_service_pb2.CancelExtractionResponse:
        job = self._extractions.get(request.extraction_id)
        await job.cancel()
        with contextlib.suppress(TimeoutError):  # A pass that is slow to end goes on ending; the answer says so.
            async with asyncio.timeout(CANCEL_WAIT_S):
                while not job.value.state.ended:
                    await job.changed(CANCEL_WAIT_S)
        return extraction_service_pb2.CancelExtractionResponse(extraction=convert.extraction_to_pb(job.value))

    async def WatchExtraction(
        self, request: extraction_service_pb2.WatchExtractionRequest, context: Context
    ) -> AsyncIterator[extraction_service_pb2.WatchExtractionResponse]:
        job = self._extractions.get(request.extraction_id)

        def heartbeat() -> extraction_service_pb2.WatchExtractionResponse:
            return _event(job, heartbeat=True)

        async with aclosing(watch(_changes(job), heartbeat=heartbeat, shutdown=self._shutdown)) as events:
            async for event in events:
                yield event

    async def StreamActivations(
        self, request: extraction_service_pb2.StreamActivationsRequest, context: Context
    ) -> AsyncIterator[Any]:  # Framed messages: `bytes`.
        job = self._extractions.get(request.extraction_id)
        stream = RowStream(job, stream_request_from_pb(request), self._shutdown)
        try:
            yield header_to_bytes(job, stream)
            async with aclosing(framed_rows(stream, self._metrics)) as frames, aclosing(one_ahead(frames)) as messages:
                async for message in messages:
                    yield message
        finally:
            stream.close()

    async def ReleaseRows(
        self, request: extraction_service_pb2.ReleaseRowsRequest, context: Context
    ) -> extraction_service_pb2.ReleaseRowsResponse:
        self._extractions.get(request.extraction_id).release(request.reader, request.row)
        return extraction_service_pb2.ReleaseRowsResponse()

    async def VerifySet(
        self, request: extraction_service_pb2.VerifySetRequest, context: Context
    ) -> AsyncIterator[extraction_service_pb2.VerifySetResponse]:
        verification = self._extractions.verify(request.set_id)
        async with aclosing(self._shutdown.watching(verification.progress())) as steps:
            async for verified in steps:
                yield convert.verified_to_pb(verified)

    async def ListHookpoints(
        self, request: extraction_service_pb2.ListHookpointsRequest, context: Context
    ) -> extraction_service_pb2.ListHookpointsResponse:
        model = await self._extractions.ready_model(request.model_id)
        offered = (await self._extractions.catalogues.of(model)).offered
        return extraction_service_pb2.ListHookpointsResponse(
            hookpoints=[convert_hookpoint.hookpoint_to_pb(point) for point in offered]
        )

    async def DecodeTokens(
        self, request: extraction_service_pb2.DecodeTokensRequest, context: Context
    ) -> extraction_service_pb2.DecodeTokensResponse:
        if len(request.token_ids) > MAX_TOKEN_IDS:
            raise FieldInvalid(
                f"token_ids has more than {MAX_TOKEN_IDS} entries; send several calls.", field="token_ids"
            )
        model = await self._extractions.ready_model(request.model_id)
        texts = await self._decode_tokens(model.files_path, request.token_ids)
        return extraction_service_pb2.DecodeTokensResponse(texts=texts)


async def _changes(job: ExtractionJob) -> AsyncGenerator[extraction_service_pb2.WatchExtractionResponse, None]:
    """A snapshot, then every change, several quick ones as one, up to the end."""
    yield _event(job, snapshot=True)
    seen = job.seq
    while not job.value.state.ended:
        if job.seq == seen:
            await job.changed(WATCH_INTERVAL_S * 50)
            continue
        seen = job.seq
        yield _event(job)
        await asyncio.sleep(WATCH_INTERVAL_S)
    if job.seq != seen:
        yield _event(job)


def _event(
    job: ExtractionJob, *, snapshot: bool = False, heartbeat: bool = False
) -> extraction_service_pb2.WatchExtractionResponse:
    return extraction_service_pb2.WatchExtractionResponse(
        seq=job.seq, extraction=convert.extraction_to_pb(job.value), snapshot=snapshot, heartbeat=heartbeat
    )
