"""Channels and calls. Streams of rows go over `http2` instead.

An `Endpoint` is one server. Its calls are named `Service.Method`, take the request's fields and give the answer's
message; `convert` turns messages into values. Every call has a deadline, carries the bearer token and raises a
HeadraceError. Unary calls are repeated on UNAVAILABLE: all of the contract's are idempotent, the mutations by their
`request_id`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import grpc

from headrace_client.errors import Cancelled, HeadraceError, Unavailable
from headrace_client.rpc.addresses import Proxy, addresses_of
from headrace_client.rpc.calls import CALLS
from headrace_client.rpc.hints import tls_hint
from headrace_client.rpc.http2 import REQUEST_ID_KEY, CallFailed, SocketCall, authority
from headrace_client.rpc.methods import methods, request_of
from headrace_client.rpc.replicas import MAX_RECEIVE_BYTES, Replicas
from headrace_client.rpc.security import Security
from headrace_client.rpc.server_stream import RawStream, ServerStream
from headrace_client.rpc.sockets import connect
from headrace_client.rpc.status import client_closed, error_from_rpc
from headrace_client.values import SILENCE_S

log = logging.getLogger("headrace_client")

DEADLINE_S = 30.0
STREAM_LIFE_S = 6 * 3600.0  # No call without a deadline; a stream that reaches it reconnects.


def new_request_id() -> str:
    """Returns a UUID4, by which a server recognizes a repeated mutation."""
    return str(uuid.uuid4())


class Endpoint:
    """One server, or several replicas of it with commas between their addresses. Threads may share it."""

    def __init__(self, address: str, security: Security, *, deadline_s: float = DEADLINE_S) -> None:
        self.security = security
        self._replicas = Replicas(addresses_of(address, name="address"), security)
        self._deadline_s = deadline_s
        self._metadata = (("authorization", f"Bearer {security.token}"),) if security.token else ()
        self._closed = False

    @property
    def address(self) -> str:
        """The address of the replica that is asked at present."""
        return self._replicas.address

    @property
    def n_replicas(self) -> int:
        """The number of addresses; a stream that fails moves on to the next of them."""
        return self._replicas.n_addresses

    def unary(self, method: str, *, deadline_s: float | None = None, **fields: Any) -> Any:
        """Calls `Service.Method` and returns its answer."""
        known = methods()[method]
        request = request_of(known, fields)

        def call(channel: grpc.Channel, timeout_s: float) -> tuple[Any, Any]:
            stub = channel.unary_unary(
                known.path,
                request_serializer=known.request.SerializeToString,
                response_deserializer=known.response.FromString,
            )
            return _finish(stub, request, timeout_s, self._metadata)

        began_s, limit_s = time.monotonic(), deadline_s or self._deadline_s
        with self._mapped_errors():
            answer, done = self._replicas.first_answer(call, deadline_s=limit_s, failed=self._error_of)
        if log.isEnabledFor(logging.DEBUG):
            request_id = dict(done.trailing_metadata() or ()).get(REQUEST_ID_KEY, "unknown")
            took_ms = 1000 * (time.monotonic() - began_s)
            log.debug("%s at %s: %.0f ms, request %s", method, self.address, took_ms, request_id)
        return answer

    def upload(self, method: str, messages: Iterable[Any], *, deadline_s: float) -> Any:
        """Calls `Service.Method` with a stream of messages. An error of the iterator `messages` is raised here too."""
        known = methods()[method]
        source = _Remembering(messages)
        with self._mapped_errors():
            call = self._replicas.channel().stream_unary(
                known.path,
                request_serializer=known.request.SerializeToString,
                response_deserializer=known.response.FromString,
            )
            try:
                return _finish(call, source, deadline_s, self._metadata)[0]
            except grpc.RpcError:
                if source.error is not None:
                    raise source.error from None
                raise

    def stream(
        self,
        method: str,
        *,
        silence_s: float = SILENCE_S,
        life_s: float = STREAM_LIFE_S,
        **fields: Any,
    ) -> ServerStream:
        """Opens `Service.Method`, by which the server sends a stream of messages."""
        known = methods()[method]
        address = self.address
        with self._mapped_errors():
            call = self._replicas.channel().unary_stream(
                known.path,
                request_serializer=known.request.SerializeToString,
                response_deserializer=known.response.FromString,
            )
            opened = call(request_of(known, fields), timeout=life_s, metadata=self._metadata)
        stream = ServerStream(opened, silence_s=silence_s, address=address, failed=self._stream_failed(address))
        if (calls := CALLS.get()) is not None:
            calls.begin(stream.close)
        return stream

    @contextlib.contextmanager
    def raw_stream(
        self, method: str, *, silence_s: float = SILENCE_S, life_s: float = STREAM_LIFE_S, **fields: Any
    ) -> Iterator[RawStream]:
        """Opens `Service.Method` over a connection of its own; messages come serialized."""
        known = methods()[method]
        request = request_of(known, fields).SerializeToString()
        if self._closed:
            raise client_closed()
        address = self.address
        with contextlib.ExitStack() as stack:
            with self._mapped_errors():
                # gRPC's core reads the environment for its own channels; rows take the same way.
                sock = connect(address, self.security.roots(address), Proxy.of(address, os.environ))
                stack.enter_context(contextlib.closing(sock))
                call = SocketCall(sock, MAX_RECEIVE_BYTES)
                call.start(known.path, request, self._metadata, authority=authority(address), life_s=life_s)
            stream = RawStream(call, silence_s=silence_s, address=address, failed=self._stream_failed(address))
            yield stack.enter_context(stream)

    def health(self, service: str = "", *, deadline_s: float | None = None) -> str:
        """Asks the standard health service. Returns SERVING, NOT_SERVING, SERVICE_UNKNOWN or UNKNOWN."""
        # grpc.health.v1 is two one-field messages; the package for them is a server's dependency.
        request = b"\x0a" + bytes((len(service),)) + service.encode() if service else b""

        def call(channel: Any, timeout_s: float) -> bytes:
            answer: bytes = channel.unary_unary("/grpc.health.v1.Health/Check")(
                request, timeout=timeout_s, metadata=self._metadata
            )
            return answer

        with self._mapped_errors():
            answer = self._replicas.first_answer(call, deadline_s=deadline_s or self._deadline_s, failed=self._error_of)
        number = answer[1] if len(answer) == 2 else 0
        return ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")[min(number, 3)]

    def close(self) -> None:
        """Closes the connections; calls in progress are cancelled."""
        self._closed = True
        self._replicas.close()

    def _error_of(self, exc: grpc.RpcError | CallFailed, address: str, *, streaming: bool = False) -> HeadraceError:
        return error_from_rpc(
            exc, address, streaming=streaming, hint=lambda text: tls_hint(address, self.security, text)
        )

    def _stream_failed(self, address: str) -> Callable[[Any], HeadraceError]:
        def failed(exc: Any) -> HeadraceError:
            error = self._error_of(exc, address, streaming=True)
            if isinstance(error, Unavailable):
                self._replicas.move_on(address)  # Streams are opened again by their readers, then at the next replica.
            return error

        return failed

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        address = self.address
        try:
            yield
        except (grpc.RpcError, CallFailed) as exc:
            raise self._error_of(exc, address) from exc
        except ValueError as exc:  # gRPC's error for a call over a closed channel.
            if not self._closed:
                raise
            raise client_closed() from exc


def _finish(call: Any, request: Any, deadline_s: float, metadata: tuple[tuple[str, str], ...]) -> tuple[Any, Any]:
    """Makes a call and waits for its answer; returns it with the call, which has the trailing metadata."""
    if (calls := CALLS.get()) is None:
        answer, done = call.with_call(request, timeout=deadline_s, metadata=metadata)
        return answer, done
    future = call.future(request, timeout=deadline_s, metadata=metadata)
    calls.begin(future.cancel)
    try:
        return future.result(), future
    except grpc.FutureCancelledError as exc:
        raise Cancelled("the call was cancelled by its caller") from exc


class _Remembering:
    """An iterator that keeps its source's error: gRPC reports it as UNKNOWN, without the cause."""

    def __init__(self, messages: Iterable[Any]) -> None:
        self._messages = iter(messages)
        self.error: Exception | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._messages)
        except StopIteration:
            raise
        except Exception as exc:
            self.error = exc
            raise
