"""Channels and calls. Streams of rows go over `http2` instead.

An `Endpoint` is one server. Its calls are named `Service.Method`, take the request's fields and give the answer's
message; `convert` turns messages into values. Every call has a deadline, carries the bearer token and raises a
HeadraceError. Unary calls are repeated on UNAVAILABLE: all of the contract's are idempotent, the mutations by their
`request_id`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from headrace_client import errors
from headrace_client.rpc.http2 import CallFailed, SocketCall, authority, connect
from headrace_client.rpc.methods import methods, request_of, service_config
from headrace_client.rpc.server_stream import RawStream, ServerStream
from headrace_client.rpc.status import client_closed, error_from_rpc
from headrace_client.values import SILENCE_S

DEADLINE_S = 30.0
STREAM_LIFE_S = 6 * 3600.0  # No call without a deadline; a stream that reaches it reconnects.
MAX_RECEIVE_BYTES = 17 * 1024 * 1024  # A chunk of 16 MiB and its frame.


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Proofs of identity: a root certificate (PEM) for the server, a bearer token for the client."""

    token: str | None = None
    ca_pem: bytes | None = None

    @classmethod
    def load(cls, token: str | None, ca_file: str | Path | None) -> Self:
        """Reads the root certificate. Raises InvalidArgument if it can't be read."""
        try:
            return cls(token=token, ca_pem=Path(ca_file).read_bytes() if ca_file else None)
        except OSError as exc:
            raise errors.InvalidArgument(f"the root certificate can't be read: {exc}") from exc


def _options(address: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        # The servers permit a ping every 10 s, and close connections that ping more often.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),  # The server has a limit of its own.
        ("grpc.enable_retries", 1),
        ("grpc.service_config", service_config()),
        # gRPC's default of up to two minutes between attempts outlives most restarts.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    # A proxy from the environment does not lead to this host.
    if address.rsplit(":", 1)[0] in ("127.0.0.1", "localhost", "[::1]"):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def new_request_id() -> str:
    """Returns a UUID4, by which a server recognizes a repeated mutation."""
    return str(uuid.uuid4())


class Endpoint:
    """One server. Threads may share it."""

    def __init__(self, address: str, security: Security, *, deadline_s: float = DEADLINE_S) -> None:
        self.address = address
        self.security = security
        self._deadline_s = deadline_s
        self._metadata = (("authorization", f"Bearer {security.token}"),) if security.token else ()
        options = _options(address)
        if security.ca_pem is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(security.ca_pem), options)
        self._closed = False

    def unary(self, method: str, *, deadline_s: float | None = None, **fields: Any) -> Any:
        """Calls `Service.Method` and returns its answer."""
        known = methods()[method]
        call = self._channel.unary_unary(
            known.path,
            request_serializer=known.request.SerializeToString,
            response_deserializer=known.response.FromString,
        )
        with self._mapped_errors():
            return call(request_of(known, fields), timeout=deadline_s or self._deadline_s, metadata=self._metadata)

    def upload(self, method: str, messages: Iterable[Any], *, deadline_s: float) -> Any:
        """Calls `Service.Method` with a stream of messages. An error of the iterator `messages` is raised here too."""
        known = methods()[method]
        call = self._channel.stream_unary(
            known.path,
            request_serializer=known.request.SerializeToString,
            response_deserializer=known.response.FromString,
        )
        source = _Remembering(messages)
        with self._mapped_errors():
            try:
                return call(source, timeout=deadline_s, metadata=self._metadata)
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
        call = self._channel.unary_stream(
            known.path,
            request_serializer=known.request.SerializeToString,
            response_deserializer=known.response.FromString,
        )
        with self._mapped_errors():
            opened = call(request_of(known, fields), timeout=life_s, metadata=self._metadata)
        return ServerStream(opened, silence_s=silence_s, address=self.address)

    @contextlib.contextmanager
    def raw_stream(
        self, method: str, *, silence_s: float = SILENCE_S, life_s: float = STREAM_LIFE_S, **fields: Any
    ) -> Iterator[RawStream]:
        """Opens `Service.Method` over a connection of its own; messages come serialized."""
        known = methods()[method]
        request = request_of(known, fields).SerializeToString()
        if self._closed:
            raise client_closed()
        with self._mapped_errors():
            sock = connect(self.address, self.security.ca_pem)
        with contextlib.closing(sock):
            call = SocketCall(sock, MAX_RECEIVE_BYTES)
            call.start(known.path, request, self._metadata, authority=authority(self.address), life_s=life_s)
            with RawStream(call, silence_s=silence_s, address=self.address) as stream:
                yield stream

    def health(self, service: str = "", *, deadline_s: float | None = None) -> str:
        """Asks the standard health service. Returns SERVING, NOT_SERVING, SERVICE_UNKNOWN or UNKNOWN."""
        # grpc.health.v1 is two one-field messages; the package for them is a server's dependency.
        request = b"\x0a" + bytes((len(service),)) + service.encode() if service else b""
        call: Any = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        with self._mapped_errors():
            answer = call(request, timeout=deadline_s or self._deadline_s, metadata=self._metadata)
        number = answer[1] if len(answer) == 2 else 0
        return ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")[min(number, 3)]

    def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        self._closed = True
        self._channel.close()

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (grpc.RpcError, CallFailed) as exc:
            raise error_from_rpc(exc, self.address) from exc
        except ValueError as exc:  # gRPC's error for a call over a closed channel.
            if not self._closed:
                raise
            raise client_closed() from exc


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
