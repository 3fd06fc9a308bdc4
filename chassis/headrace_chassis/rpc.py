"""The life of one RPC: admitted, run, mapped to a status, counted, logged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias, TypeVar
from urllib.parse import unquote

import grpc
from grpc_status import rpc_status

from headrace_chassis.deadline import current_deadline
from headrace_chassis.errors import MethodUnknown, ServiceError, ShuttingDown
from headrace_chassis.logs import current_request_id
from headrace_chassis.metrics import Metrics
from headrace_chassis.places import Places
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.status import INTERNAL, StatusTable, reason_of

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

REQUEST_ID_KEY = "x-request-id"
_NO_RETRY = ("grpc-retry-pushback-ms", "-1")  # By gRPC's protocol of retries.

_LOG = logging.getLogger("headrace_chassis.rpc")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(slots=True, kw_only=True, eq=False)
class Rpc:
    """One RPC from its headers to its status."""

    method: str  # As in `/package.Service/Method`.
    known: bool  # False for a method that the server does not have: its name must not become a metric's label.
    streaming: bool
    service: str
    request_id: str
    started_s: float
    peer: str = ""
    refused: bool = False  # Before it ran: without the token, or for a method that the server does not have.
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    bug: BaseException | None = None
    task: asyncio.Task[Any] | None = field(default=None, repr=False)
    cut: bool = False  # The server, not the client, cancelled it, because the server goes away.

    @property
    def is_health(self) -> bool:
        """True for health checks: never refused, and logged only when they fail."""
        return self.service == "grpc.health.v1.Health"

    @property
    def is_infrastructure(self) -> bool:
        """True for streams that never end by themselves: a drain does not wait for them."""
        return self.is_health or self.service.startswith("grpc.reflection.")


class RpcRunner:
    """Runs the bodies of RPCs; every exception leaves as one status with one reason."""

    def __init__(
        self,
        *,
        statuses: StatusTable,
        metrics: Metrics,
        shutdown: Shutdown,
        places: Places,
        heard: Callable[[str], None] = lambda _peer: None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._statuses = statuses
        self._metrics = metrics
        self._shutdown = shutdown
        self._places = places
        self._heard = heard
        self._clock_s = clock_s
        self._active: set[Rpc] = set()

    async def run(self, rpc: Rpc, context: Context, body: Callable[[], Awaitable[T]]) -> T:
        """Awaits `body()` as the work of `rpc`. A client's cancellation passes through; other exceptions are mapped."""
        current_request_id.set(rpc.request_id)
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            current_deadline.set(asyncio.get_running_loop().time() + remaining_s)
        rpc.peer, rpc.task = unquote(context.peer()), asyncio.current_task()
        context.set_trailing_metadata(((REQUEST_ID_KEY, rpc.request_id),))
        try:
            with self._admitted(rpc):
                return await body()
        except asyncio.CancelledError:
            if not rpc.cut or rpc.task is None:
                remaining_s = context.time_remaining()
                expired = remaining_s is not None and remaining_s <= 0
                rpc.code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
                raise
            rpc.task.uncancel()
            await self._abort(rpc, context, ShuttingDown())
        except grpc.aio.AbortError:
            rpc.code = _code_of(context)
            raise
        except grpc.aio.InternalError as exc:
            _end_as_cancelled(rpc, exc)
        except Exception as exc:  # noqa: BLE001 - the wall of the process: every error becomes a status here
            await self._abort(rpc, context, exc)
        finally:
            seconds = self._clock_s() - rpc.started_s
            self._metrics.rpc_finished(rpc.method if rpc.known else "unknown", rpc.code.name, seconds)
            level = logging.ERROR if rpc.bug is not None else logging.INFO
            if rpc.is_health and rpc.code in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
                level = logging.DEBUG
            fields = {
                "method": rpc.method,
                "code": rpc.code.name,
                "reason": rpc.reason,
                "duration_ms": round(seconds * 1000, 3),
                "peer": rpc.peer,
                "request_id": rpc.request_id,
            }
            _LOG.log(level, "rpc", extra={"fields": fields}, exc_info=rpc.bug)

    @property
    def busy_peers(self) -> set[str]:
        """The peers with a call in progress that they may make: neither refused nor of the health service."""
        return {rpc.peer for rpc in self._active if not (rpc.refused or rpc.is_health)}

    def cut(self, *, infrastructure_only: bool) -> None:
        """Ends RPCs in progress with SHUTTING_DOWN."""
        for rpc in self._active:
            if rpc.task is not None and not rpc.cut and (rpc.is_infrastructure or not infrastructure_only):
                rpc.cut = True
                rpc.task.cancel()

    @contextlib.contextmanager
    def _admitted(self, rpc: Rpc) -> Iterator[None]:
        """Counts an RPC as active for the time of a `with` block, or refuses it."""
        with contextlib.ExitStack() as stack:
            if not rpc.refused:  # A refused call takes no place: else calls without the token could take all.
                if not rpc.is_health:
                    self._shutdown.check()
                stack.enter_context(self._places.taken(rpc))
                if rpc.streaming and rpc.known:
                    stack.enter_context(self._metrics.stream_open(rpc.method))
                if not rpc.is_health:
                    self._heard(rpc.peer)
            self._active.add(rpc)
            stack.callback(self._active.discard, rpc)
            yield

    async def _abort(self, rpc: Rpc, context: Context, exc: Exception) -> NoReturn:
        """Sends the status of `exc`; raises the exception that grpc expects after an abort."""
        if isinstance(exc, NotImplementedError) and _code_of(context) is grpc.StatusCode.UNIMPLEMENTED:
            exc = MethodUnknown(rpc.method)  # A generated servicer's method that was not overridden.
        rich = self._statuses.rich_status(exc, request_id=rpc.request_id)
        rpc.code, rpc.reason = _CODES[rich.code], reason_of(rich)
        rpc.bug = exc if rpc.reason == INTERNAL else None
        status = rpc_status.to_status(rich)
        trailing = (*status.trailing_metadata, (REQUEST_ID_KEY, rpc.request_id))
        if isinstance(exc, ServiceError) and exc.waited:
            trailing = (*trailing, _NO_RETRY)
        try:
            await context.abort(status.code, status.details, trailing)
        except grpc.aio.InternalError as gone:
            _end_as_cancelled(rpc, gone)


def _end_as_cancelled(rpc: Rpc, exc: grpc.aio.InternalError) -> NoReturn:
    """Ends as cancelled an RPC whose client left: the write failed before grpc reported the cancellation."""
    rpc.code, rpc.reason = grpc.StatusCode.CANCELLED, ""
    raise asyncio.CancelledError from exc


def _code_of(context: Context) -> grpc.StatusCode:
    code: Any = context.code()  # An int, whatever the annotation says.
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.UNKNOWN)
