"""The one interceptor of a server: checks each incoming call, then runs it as an `Rpc`.

Authentication is decided on the headers, before any message is read. Handlers may be async generators or coroutines
that call `context.write`. Both run inside a coroutine that owns the generator: when the client disappears, the
generator is closed at once, not when it is collected. Response messages, raw bytes included, are passed on untouched.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from headrace_chassis.auth import TokenGate
from headrace_chassis.errors import MessageTooLarge, MethodUnknown, RequestMalformed, RequestMissing, ServiceError
from headrace_chassis.rpc import REQUEST_ID_KEY, Context, Rpc, RpcRunner

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], "Awaitable[Handler | None]"]

# grpc ends a request stream in the same way whether the client closed it, broke off or sent too much. In the last two
# cases a cancellation follows some loop iterations later; waiting for it keeps a torn upload from looking whole.
_END_OF_REQUESTS_S = 0.05

# From the headers of a call to its message; 4 MiB over a slow line take most of it. Health checks have a few bytes.
_REQUEST_S = 60.0
_HEALTH_REQUEST_S = 5.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MAX_METHOD_CHARACTERS = 200  # The client chose the name, and it goes into a log line.


class ChassisInterceptor(grpc.aio.ServerInterceptor):
    """Authentication, limits, status mapping, metrics and the log line, for all four kinds of RPC."""

    def __init__(
        self,
        *,
        runner: RpcRunner,
        gate: TokenGate,
        max_receive_bytes: int,
        new_request_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._gate = gate
        self._max_receive_bytes = max_receive_bytes
        self._new_request_id = new_request_id
        self._clock_s = clock_s

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Returns a handler that runs the method as an Rpc, or one that refuses it without reading a message."""
        handler = await continuation(handler_call_details)
        method, metadata = handler_call_details.method, tuple(handler_call_details.invocation_metadata)
        given = next((value for key, value in metadata if key == REQUEST_ID_KEY), "")
        usable = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        rpc = Rpc(
            method=method[:_MAX_METHOD_CHARACTERS] or "unknown",
            known=handler is not None,
            streaming=handler is not None and (handler.request_streaming or handler.response_streaming),
            service=method.strip("/").rpartition("/")[0],
            request_id=str(given) if usable else self._new_request_id(),
            started_s=self._clock_s(),
        )
        try:
            if not rpc.is_health:
                self._gate.check(metadata)
            if handler is None:
                raise MethodUnknown(method[:_MAX_METHOD_CHARACTERS])
        except ServiceError as exc:
            return self._refusing(rpc, exc)
        return self._running(rpc, handler)

    def _refusing(self, rpc: Rpc, exc: ServiceError) -> Handler:
        async def refuse() -> None:
            raise exc

        async def behave(_requests: AsyncIterator[Any], context: Context) -> None:
            rpc.refused = True
            await self._runner.run(rpc, context, refuse)

        # A handler that streams in both directions fits every method: it reads no message and sends only the status.
        return grpc.stream_stream_rpc_method_handler(behave)

    def _running(self, rpc: Rpc, handler: Handler) -> Handler:
        kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        behaviour: Any = next(kind for kind in kinds if kind is not None)  # grpc's stubs know synchronous ones only.

        async def on_request(_requests: AsyncIterator[Any], context: Context) -> Any:
            async def body() -> Any:
                return await _answer(behaviour(await _only_request(rpc, context), context), context)

            return await self._runner.run(rpc, context, body)

        async def on_requests(requests: AsyncIterator[Any], context: Context) -> Any:
            async def until_certain_end() -> AsyncGenerator[Any, None]:
                async for request in requests:
                    yield request
                await asyncio.sleep(_END_OF_REQUESTS_S)

            async def body() -> Any:
                async with aclosing(until_certain_end()) as certain:
                    return await _answer(behaviour(certain, context), context)

            return await self._runner.run(rpc, context, body)

        chosen: Any = on_requests if handler.request_streaming else on_request
        # As a stream of requests in any case: grpc reads a single request before the handler runs, so that a call
        # whose message never comes would wait for ever, without a place and without an answer.
        make = _MAKERS[handler.response_streaming]
        return make(chosen, self._reader(rpc.method, handler), handler.response_serializer)

    def _reader(self, method: str, handler: Handler) -> Callable[[bytes], Any]:
        """Returns a deserializer that checks size and content."""
        limit, deserialize = self._max_receive_bytes, handler.request_deserializer

        def read(raw: bytes) -> Any:
            if len(raw) > limit:
                raise MessageTooLarge(size_bytes=len(raw), limit_bytes=limit)
            try:
                return deserialize(raw) if deserialize is not None else raw
            except DecodeError as exc:
                raise RequestMalformed(method) from exc

        return read


_MAKERS: dict[bool, Callable[..., Handler]] = {
    False: grpc.stream_unary_rpc_method_handler,
    True: grpc.stream_stream_rpc_method_handler,
}


async def _only_request(rpc: Rpc, context: Context) -> Any:
    """Returns the message of a call that has one. Raises RequestMissing."""
    wait_s = _HEALTH_REQUEST_S if rpc.is_health else _REQUEST_S
    try:
        async with asyncio.timeout(wait_s):
            request = await context.read()
    except TimeoutError:
        raise RequestMissing(rpc.method) from None
    if request is grpc.aio.EOF:
        await asyncio.sleep(_END_OF_REQUESTS_S)
        raise RequestMissing(rpc.method)
    return request


async def _answer(answer: Any, context: Context) -> Any:
    """Sends the messages of an async generator; returns the result of a coroutine, which may write by itself."""
    if not isinstance(answer, AsyncGenerator):
        return await answer
    async with aclosing(answer) as messages:
        async for message in messages:
            await context.write(message)
    return None
