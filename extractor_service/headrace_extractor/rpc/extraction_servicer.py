"""ExtractionService: check, call the core, fill the answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from headrace.extractor.v1 import extraction_pb2, extraction_service_pb2, extraction_service_pb2_grpc
from headrace_chassis.metrics import Metrics
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.watch import watch
from headrace_extractor.errors import FieldInvalid, ModelNotReady
from headrace_extractor.extractions.extractions import Extractions
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.extractions.ports import Models
from headrace_extractor.hookpoints import catalogue as hookpoints
from headrace_extractor.reading.row_stream import End, Pause, RowStream
from headrace_extractor.rpc.convert import extractions as convert
from headrace_extractor.rpc.convert import hookpoints as convert_hookpoint
from headrace_extractor.rpc.convert.streams import header_to_bytes, stream_request_from_pb
from headrace_log.frames import encode_chunk
from headrace_log.reader import RowRun

MAX_TOKEN_IDS = 100_000
MAX_PAGE_SIZE = 1000
# Progress is for people; ten a second is smooth.
WATCH_INTERVAL_S = 0.1
STREAM_METHOD = "/headrace.extractor.v1.ExtractionService/StreamActivations"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ExtractionServicer(extraction_service_pb2_grpc.ExtractionServiceServicer):
    """Serves the extractions of this node."""

    def __init__(
        self,
        extractions: Extractions,
        models: Models,
        *,
        decode_tokens: Callable[[str, Sequence[int]], Awaitable[list[str]]],
        metrics: Metrics,
        shutdown: Shutdown,
    ) -> None:
        self._extractions = extractions
        self._models = models
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
        start = _offset(request.page_token)
        size = page_size(request.page_size)
        page = values[start : start + size]
        more = start + size < len(values)
        return extraction_service_pb2.ListExtractionsResponse(
            extractions=[convert.extraction_to_pb(value) for value in page],
            next_page_token=_token(start + size) if more else "",
        )

    async def CancelExtraction(
        self, request: extraction_service_pb2.CancelExtractionRequest, context: Context
    ) -> extraction_service_pb2.CancelExtractionResponse:
        job = self._extractions.get(request.extraction_id)
        await job.cancel()
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
            async with aclosing(self._frames(stream)) as frames, aclosing(_one_ahead(frames)) as messages:
                async for message in messages:
                    yield message
        finally:
            stream.close()

    async def ReleaseRows(
        self, request: extraction_service_pb2.ReleaseRowsRequest, context: Context
    ) -> extraction_service_pb2.ReleaseRowsResponse:
        self._extractions.get(request.extraction_id).release(request.reader, request.row)
        return extraction_service_pb2.ReleaseRowsResponse()

    async def ListHookpoints(
        self, request: extraction_service_pb2.ListHookpointsRequest, context: Context
    ) -> extraction_service_pb2.ListHookpointsResponse:
        model = await self._models.get_model(request.model_id)
        if not model.ready:
            raise ModelNotReady(f"Model {model.id} has no files yet; run PrepareModel and wait for READY.")
        offered = hookpoints.catalogue_of(model).offered
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
        model = await self._models.get_model(request.model_id)
        if not model.ready:
            raise ModelNotReady(f"Model {model.id} has no files yet; run PrepareModel and wait for READY.")
        texts = await self._decode_tokens(model.files_path, request.token_ids)
        return extraction_service_pb2.DecodeTokensResponse(texts=texts)

    async def _frames(self, stream: RowStream) -> AsyncGenerator[bytes, None]:
        async with aclosing(stream.events()) as events:
            ordered = bool(stream.block_rows)
            async for event in events:
                yield self._frame(event, stream.next_row if ordered else 0)

    def _frame(self, event: RowRun | Pause | End, position: int) -> bytes:
        if isinstance(event, RowRun):
            message = encode_chunk(event.first_row, event.n_rows, event.columns, position)
            self._metrics.sent(STREAM_METHOD, len(message), event.n_rows)
            return message
        if isinstance(event, Pause):
            state = extraction_pb2.ExtractionState.Value(f"EXTRACTION_STATE_{event.state}")
            progress = extraction_service_pb2.StreamProgress(n_rows=event.n_rows, state=state)
            return extraction_service_pb2.StreamActivationsResponse(progress=progress).SerializeToString()
        end = extraction_service_pb2.StreamEnd(next_row=event.next_row, n_rows=event.n_rows)
        return extraction_service_pb2.StreamActivationsResponse(end=end).SerializeToString()


async def _one_ahead(messages: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Makes each message while gRPC sends the one before it."""

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


def page_size(asked: int) -> int:
    """Rows of a page; raises FieldInvalid."""
    if asked < 0:
        raise FieldInvalid("page_size is negative; 0 means 100.", field="page_size")
    return min(asked or 100, MAX_PAGE_SIZE)


def _token(offset: int) -> str:
    return base64.urlsafe_b64encode(str(offset).encode()).decode()


def _offset(token: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(token.encode())) if token else 0
    except (binascii.Error, ValueError) as exc:
        raise FieldInvalid("page_token is none that ListExtractions gave out.", field="page_token") from exc
