"""gRPC's server for asyncio, without an error of its own that lets one caller end it.

Its loop over incoming calls decodes the name of every method that is not registered, and bytes that are no UTF-8 end
that loop, and the server with it. The names of registered methods are compared as bytes. Here the loop hears of
registered methods alone; calls of all others are answered beside it, without a look at their names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

# ruff: noqa: SLF001 -- gRPC has no public way to replace its loop; tests hold the names that are used here.


def accepting_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    *,
    options: Sequence[tuple[str, Any]],
    max_rpcs: int,
    on_end: Callable[[BaseException], None],
) -> grpc.aio.Server:
    """Returns a server for methods added by `add_registered_method_handlers`, as generated code does; no generic ones.

    `on_end` is called with the error if the loop over incoming calls ends for another reason than `stop`.
    """
    return cast("grpc.aio.Server", _Server(tuple(interceptors), tuple(options), max_rpcs, on_end))


# The name that calls of methods which are not registered have in the log, where gRPC's code wants one.
_UNREGISTERED = ""


class _Server(_server.Server):
    def __init__(
        self,
        interceptors: tuple[grpc.aio.ServerInterceptor, ...],
        options: tuple[tuple[str, Any], ...],
        max_rpcs: int,
        on_end: Callable[[BaseException], None],
    ) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _Calls(self._loop, None, (), interceptors, options, max_rpcs)
        self._server.interceptors, self._server.on_end = interceptors, on_end


class _Calls(cygrpc.AioServer):  # type: ignore[misc] # Compiled, without types.
    interceptors: tuple[grpc.aio.ServerInterceptor, ...]
    on_end: Callable[[BaseException], None]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answering: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> Any:
        """Answers calls of methods that are not registered, and never returns: the loop would decode their names."""
        loop, none = asyncio.get_running_loop(), cygrpc._MethodResolver([], {})
        while True:
            call = await super()._request_call()
            answer = cygrpc._handle_rpc(_UNREGISTERED, none, self.interceptors, call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, _UNREGISTERED))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    def _serving_task_crash_handler(self, task: asyncio.Task[None]) -> None:
        super()._serving_task_crash_handler(task)
        if self.is_running() and not task.cancelled() and (error := task.exception()) is not None:
            self.on_end(error)
