"""Channels, calls and errors: the only file that imports grpc. Streams of rows go over `_http2` instead.

An `Endpoint` is one server. Its calls are named `Service.Method`, take the request's fields and give the answer's
message; `_convert` turns messages into values. Every call has a deadline, carries the bearer token and raises a
HeadraceError. Unary calls are repeated on UNAVAILABLE: all of the contract's are idempotent, the mutations by their
`request_id`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from headrace.extractor.v1 import corpus_service_pb2, extraction_service_pb2
from headrace.registry.v1 import activation_set_service_pb2, model_service_pb2, residency_service_pb2
from headrace_client import errors
from headrace_client._http2 import STATUS_DETAILS_KEY, CallFailed, SocketCall, authority, connect

DEADLINE_S = 30.0
SILENCE_S = 45.0  # Three heartbeats of the servers.
STREAM_LIFE_S = 6 * 3600.0  # No call without a deadline; a stream that reaches it reconnects.
MAX_RECEIVE_BYTES = 17 * 1024 * 1024  # A chunk of 16 MiB and its frame.
_SERVICES = (
    model_service_pb2,
    residency_service_pb2,
    activation_set_service_pb2,
    extraction_service_pb2,
    corpus_service_pb2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How to prove who is who: the server by a root certificate (PEM), the client by a bearer token."""

    token: str | None = None
    ca_pem: bytes | None = None

    @classmethod
    def load(cls, token: str | None, ca_file: str | Path | None) -> Self:
        """Reads the root certificate."""
        try:
            return cls(token=token, ca_pem=Path(ca_file).read_bytes() if ca_file else None)
        except OSError as exc:
            raise errors.InvalidArgument(f"the root certificate can't be read: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _Method:
    path: str
    request: type[Any]
    response: type[Any]
    unary: bool


@cache
def _methods() -> dict[str, _Method]:
    found = {}
    for module in _SERVICES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[f"{service.name}.{method.name}"] = _Method(
                    f"/{service.full_name}/{method.name}",
                    GetMessageClass(method.input_type),
                    GetMessageClass(method.output_type),
                    not (method.client_streaming or method.server_streaming),
                )
    return found


@cache
def _service_config() -> str:
    names = []
    for method in _methods().values():
        if method.unary:
            service, name = method.path[1:].split("/")
            names.append({"service": service, "method": name})
    retry = {
        "maxAttempts": 5,  # gRPC's own upper limit.
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": retry}]})


def _options(address: str) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        # The servers permit a ping every 10 s, and close connections that ping more often.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),  # The server is the judge of what is too large for it.
        ("grpc.enable_retries", 1),
        ("grpc.service_config", _service_config()),
        # gRPC's default of up to two minutes between attempts outlives most restarts.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if address.rsplit(":", 1)[0] in ("127.0.0.1", "localhost", "[::1]"):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def new_request_id() -> str:
    """Returns a UUID4, by which a server knows a repeated mutation."""
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
        known = _methods()[method]
        call = self._channel.unary_unary(
            known.path,
            request_serializer=known.request.SerializeToString,
            response_deserializer=known.response.FromString,
        )
        with self._mapped_errors():
            return call(_request(known, fields), timeout=deadline_s or self._deadline_s, metadata=self._metadata)

    def upload(self, method: str, messages: Iterable[Any], *, deadline_s: float) -> Any:
        """Calls `Service.Method` with a stream of messages. What `messages` raises is raised here too."""
        known = _methods()[method]
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
        """Opens `Service.Method`."""
        known = _methods()[method]
        call = self._channel.unary_stream(
            known.path,
            request_serializer=known.request.SerializeToString,
            response_deserializer=known.response.FromString,
        )
        with self._mapped_errors():
            opened = call(_request(known, fields), timeout=life_s, metadata=self._metadata)
        return ServerStream(opened, silence_s=silence_s, address=self.address)

    @contextlib.contextmanager
    def raw_stream(
        self, method: str, *, silence_s: float = SILENCE_S, life_s: float = STREAM_LIFE_S, **fields: Any
    ) -> Iterator[RawStream]:
        """Opens `Service.Method` over a connection of its own; its messages are serialized ones."""
        known = _methods()[method]
        request = _request(known, fields).SerializeToString()
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
        except ValueError as exc:
            if not self._closed:
                raise
            raise client_closed() from exc


class _Remembering:
    """An iterator that keeps what its source raised: gRPC reports that as UNKNOWN, without the cause."""

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


class ServerStream:
    """The messages of one server-streaming call. Raises StreamSilent when none comes for `silence_s`.

    The limit runs only while somebody waits for a message, so that a slow reader is not taken for a silent server.
    """

    def __init__(self, call: Any, *, silence_s: float, address: str) -> None:
        self._call = call
        self._silence_s = silence_s
        self._address = address
        self._waiting_since: float | None = None
        self._silent = False
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="headrace-watchdog", daemon=True)
        self._watchdog.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._waiting_since = time.monotonic()
        try:
            return next(self._call)
        except StopIteration:
            self.close()
            raise
        except (grpc.RpcError, CallFailed) as exc:
            self.close()
            raise self._error(exc) from exc
        finally:
            self._waiting_since = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        self._watchdog.join(1.0)  # It has been woken.

    def close(self) -> None:
        """Cancels the call. From any thread, any number of times."""
        self._closed.set()
        self._call.cancel()

    def _error(self, exc: grpc.RpcError | CallFailed) -> errors.HeadraceError:
        if self._silent:
            message = f"{self._address} sent nothing, not even a heartbeat, for {self._silence_s:g} s"
            return errors.StreamSilent(message)
        return error_from_rpc(exc, self._address, streaming=True)

    def _watch(self) -> None:
        pause_s = min(1.0, self._silence_s / 4)
        while not self._closed.wait(pause_s):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self._silence_s:
                self._silent = True
                self._call.cancel()
                return


class RawStream(ServerStream):
    """The serialized messages of a call over a connection of its own."""

    def __init__(self, call: SocketCall, *, silence_s: float, address: str) -> None:
        super().__init__(call, silence_s=silence_s, address=address)
        self._socket_call = call

    def tend(self) -> None:
        """Keeps the connection alive while the reader pauses; call it every few seconds."""
        self._waiting_since = time.monotonic()  # A message that stops halfway is silence here too.
        try:
            self._socket_call.tend()
        finally:
            self._waiting_since = None


def client_closed() -> errors.Cancelled:
    """What calls of a closed client raise."""
    return errors.Cancelled("the client is closed", reason="CLIENT_CLOSED", remedy="connect a new one")


def _request(method: _Method, fields: dict[str, Any]) -> Any:
    try:
        return method.request(**fields)
    except (TypeError, ValueError) as exc:
        raise errors.InvalidArgument(f"the request can't be put on the wire: {exc}") from exc


# Errors


def error_from_rpc(exc: grpc.RpcError | CallFailed, address: str, *, streaming: bool = False) -> errors.HeadraceError:
    """Turns a failed call into the error class of its reason, or of its code where the server gave none.

    A stream that breaks in the transport shows as one of several codes, without a reason: all are UNAVAILABLE here.
    """
    failed = exc if isinstance(exc, CallFailed) else _failure(exc)
    code, text = failed.code, failed.text
    facts = _facts(failed.details)
    reason = facts.pop("reason", "")
    if not reason and code == "RESOURCE_EXHAUSTED" and "larger than max" in text:
        reason = "MESSAGE_TOO_LARGE"
    if not reason and streaming and (code in ("INTERNAL", "CANCELLED") or "Stream removed" in text):
        code, text = "UNAVAILABLE", f"the connection broke: {text}"
    if not reason and code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        text = f"{address}: {text}"
    return errors.error_class(code, reason)(text, reason=reason or ("" if code in errors.BY_CODE else code), **facts)


def _failure(exc: grpc.RpcError) -> CallFailed:
    if not isinstance(exc, grpc.Call):
        return CallFailed("UNKNOWN", str(exc))
    code = exc.code().name if exc.code() else "UNKNOWN"
    trailing: Any = exc.trailing_metadata() or ()
    details = next((value for key, value in trailing if key == STATUS_DETAILS_KEY), b"")
    return CallFailed(code, exc.details() or str(exc), details)


def _facts(details: bytes) -> dict[str, Any]:
    """Reason, metadata, fields and retry delay from a google.rpc.Status."""
    facts: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    try:
        status = status_pb2.Status.FromString(details)
    except DecodeError:
        status = status_pb2.Status()
    for detail in status.details:
        for kind, read in _READERS.items():
            message = GetMessageClass(kind.DESCRIPTOR)()
            if detail.Is(kind.DESCRIPTOR) and detail.Unpack(message):
                read(message, facts, metadata)
    return {**facts, "metadata": metadata}


def _read_info(info: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    facts["reason"] = info.reason
    metadata.update(info.metadata)


def _read_retry(retry: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata
    facts["retry_after_s"] = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


def _read_fields(bad: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata
    facts["fields"] = {violation.field: violation.description for violation in bad.field_violations}


def _read_precondition(failure: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del facts
    for violation in failure.violations:
        metadata.setdefault("precondition", violation.description)


def _read_resource(info: Any, facts: dict[str, Any], metadata: dict[str, str]) -> None:
    del facts
    metadata.setdefault("resource", f"{info.resource_type}/{info.resource_name}")


_READERS: dict[Any, Callable[[Any, dict[str, Any], dict[str, str]], None]] = {
    error_details_pb2.ErrorInfo: _read_info,
    error_details_pb2.RetryInfo: _read_retry,
    error_details_pb2.BadRequest: _read_fields,
    error_details_pb2.PreconditionFailure: _read_precondition,
    error_details_pb2.ResourceInfo: _read_resource,
}
