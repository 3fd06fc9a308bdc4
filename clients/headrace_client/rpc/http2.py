"""One server-streaming gRPC call over a socket of its own, for streams of many bytes.

gRPC for Python hands out a message after three copies in user space, with the interpreter's lock held. Here the
socket's bytes go straight into the message's own memory, with the lock released. That is done for DATA frames alone;
the rest of HTTP/2 (settings, header compression, pings) is left to h2. Any gRPC server can be at the other end.
"""

from __future__ import annotations

import base64
import binascii
import selectors
import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import numpy as np

from headrace_client.rpc.addresses import is_unix

STATUS_DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
_WINDOW_BYTES = 16 * 1024 * 1024  # The server may send so much before it hears from the client.
_MAX_FRAME_BYTES = 1024 * 1024
_STREAM_ID = 1  # A client's first stream; a connection has no second one.
_DATA, _GOAWAY, _WINDOW_UPDATE = 0x0, 0x7, 0x8  # Frame types of RFC 9113.
_END_STREAM, _PADDED = 0x1, 0x8
# The server has so long to take the request and, if it is long, to make room for the rest of it.
_REQUEST_DEADLINE_S = 20.0
_HEAD = struct.Struct(">HBBBI")  # Length in 24 bits, type, flags, stream.
_CREDIT = struct.Struct(">HBBBII")  # A whole WINDOW_UPDATE frame.
_PREFIX = struct.Struct(">BI")  # gRPC's: compressed or not, and the message's length.
_CODES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
# The codes that gRPC has for HTTP statuses, which come from a proxy between client and server.
_HTTP_CODES: Mapping[str, str] = {
    "400": "INTERNAL",
    "401": "UNAUTHENTICATED",
    "403": "PERMISSION_DENIED",
    "404": "UNIMPLEMENTED",
    "429": "UNAVAILABLE",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "UNAVAILABLE",
}


@dataclass
class CallFailed(Exception):
    """The call ended with a status other than OK, or without one."""

    code: str
    text: str
    details: bytes = b""  # A google.rpc.Status.
    http_status: str = ""  # Of an answer that is no gRPC server's.
    request_id: str = ""  # Of the server's log.

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def authority(address: str) -> str:
    """The server's name in a request."""
    return "localhost" if is_unix(address) else address


@dataclass
class SocketCall:
    """The messages of one call, in order. For one thread; `cancel` is for any.

    The flow-control window bounds the bytes that were read but not asked for; the server waits beyond it.
    """

    _sock: socket.socket
    _max_message_bytes: int
    _messages: deque[memoryview] = field(default_factory=deque)
    _headers: dict[str, str] = field(default_factory=dict)
    _ended: bool = False
    _failed: CallFailed | None = None
    _credit: int = 0

    def __post_init__(self) -> None:
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        self._wait_all = 0 if isinstance(self._sock, ssl.SSLSocket) else socket.MSG_WAITALL
        self._head = memoryview(bytearray(_HEAD.size))
        self._prefix = memoryview(bytearray(_PREFIX.size))
        self._message: memoryview | None = None  # The message that is coming in, once its prefix is here.
        self._missing = self._prefix  # The rest of the prefix or of the message.

    def start(
        self, path: str, request: bytes, metadata: Iterable[tuple[str, str]], *, authority: str, life_s: float
    ) -> Self:
        """Sends the request; the server ends the call after `life_s`. Raises CallFailed."""
        codes = h2.settings.SettingCodes
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: _WINDOW_BYTES,
                codes.MAX_FRAME_SIZE: _MAX_FRAME_BYTES,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_WINDOW_BYTES - self._h2.inbound_flow_control_window)
        tls = isinstance(self._sock, ssl.SSLSocket)
        headers: Sequence[tuple[str, str]] = (
            (":method", "POST"),
            (":scheme", "https" if tls else "http"),
            (":path", path),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "headrace-client"),
            ("grpc-timeout", f"{max(1, round(life_s))}S"),
            *metadata,
        )
        self._h2.send_headers(_STREAM_ID, headers)
        self._sock.settimeout(_REQUEST_DEADLINE_S)
        left = memoryview(_PREFIX.pack(0, len(request)) + request)
        while left and not self._ended:  # In frames as large as the server takes, and beyond its window with its leave.
            room = min(self._h2.local_flow_control_window(_STREAM_ID), self._h2.max_outbound_frame_size)
            part, left = left[: max(room, 0)], left[max(room, 0) :]
            if part:
                self._h2.send_data(_STREAM_ID, bytes(part), end_stream=not left)
                self._send(self._h2.data_to_send())
            else:
                self._read_frame()
        self._sock.settimeout(None)
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> memoryview:
        """Waits for a message without a limit of its own. Raises CallFailed if the call ends with another status."""
        while not self._messages:
            if self._failed is not None:
                raise self._failed
            if self._ended:
                self._check_status()
                raise StopIteration
            if self._credit >= _WINDOW_BYTES // 4:  # Before the wait, since the server may be out of credit.
                credit, self._credit = self._credit, 0
                self._send(
                    b"".join(_CREDIT.pack(0, 4, _WINDOW_UPDATE, 0, stream_id, credit) for stream_id in (0, _STREAM_ID))
                )
            self._read_frame()
        return self._messages.popleft()

    def tend(self) -> None:
        """Reads the frames that have arrived, without giving the server new credit, so that its pings are answered.

        Raises nothing: an error is raised by `next` behind the messages that were whole.
        """
        try:
            # select() itself knows no descriptor beyond 1023.
            with selectors.DefaultSelector() as selector:
                selector.register(self._sock, selectors.EVENT_READ)
                while not (self._ended or self._failed):
                    decrypted = isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()
                    if not decrypted and not selector.select(0):
                        return
                    self._read_frame()
        except CallFailed as exc:
            self._failed = exc

    def cancel(self) -> None:
        """Breaks the connection: a thread that waits for a message gets CallFailed."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket; not while another thread reads."""
        self._sock.close()

    def _read_frame(self) -> None:
        self._fill(self._head)
        high, low, kind, flags, stream_id = _HEAD.unpack(self._head)
        length = high << 8 | low
        if length > _MAX_FRAME_BYTES:
            raise CallFailed("UNAVAILABLE", "the peer does not speak HTTP/2, or sent a frame larger than allowed")
        if kind == _DATA and stream_id == _STREAM_ID:
            self._credit += length
            self._read_data(length, flags)
            self._ended = self._ended or bool(flags & _END_STREAM)
            return
        payload = bytearray(length)
        self._fill(memoryview(payload))
        if kind != _GOAWAY:
            self._control(self._head.tobytes() + payload)
            return
        # Not for h2, which takes no frame after a GOAWAY: calls up to the last stream it names go on to their end.
        if int.from_bytes(payload[:4], "big") & 0x7FFFFFFF < _STREAM_ID:
            raise CallFailed("UNAVAILABLE", f"the server goes away: {payload[8:].decode(errors='replace')}")

    def _read_data(self, length: int, flags: int) -> None:
        padding = 0
        if flags & _PADDED and length:
            size = bytearray(1)
            self._fill(memoryview(size))
            padding = size[0]
            length -= 1 + padding
        while length > 0:
            part = self._missing[:length]
            self._fill(part)
            length -= len(part)
            self._missing = self._missing[len(part) :]
            if not self._missing:
                self._part_done()
        self._fill(memoryview(bytearray(padding)))

    def _part_done(self) -> None:
        """Takes a complete prefix or a complete message; the other comes next."""
        if self._message is None:
            compressed, length = _PREFIX.unpack(self._prefix)
            if compressed:
                raise CallFailed("INTERNAL", "the server compressed a message, which it was not asked for")
            if length > self._max_message_bytes:
                limit = self._max_message_bytes
                raise CallFailed("RESOURCE_EXHAUSTED", f"a message of {length} bytes is larger than max ({limit})")
            self._message = self._missing = np.empty(length, np.uint8).data
            if length:
                return
        self._messages.append(self._message)
        self._message, self._missing = None, self._prefix

    def _control(self, frame: bytes) -> None:
        try:
            events = self._h2.receive_data(frame)
        except h2.exceptions.ProtocolError as exc:
            raise CallFailed("UNAVAILABLE", f"the peer broke the rules of HTTP/2: {exc}") from exc
        self._send(self._h2.data_to_send())
        for event in events:
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                self._headers.update((str(name), str(value)) for name, value in event.headers or ())
                status, kind = self._headers.get(":status", ""), self._headers.get("content-type", "application/grpc")
                if "grpc-status" not in self._headers and (status != "200" or not kind.startswith("application/grpc")):
                    # The page of a proxy or web server, whatever its body is: messages are not in it.
                    text = f"HTTP status {status} and {kind}, which is not a gRPC server's answer"
                    raise CallFailed(_HTTP_CODES.get(status, "UNKNOWN"), text, http_status=status)
            elif isinstance(event, h2.events.StreamEnded):
                self._ended = True
            elif isinstance(event, h2.events.StreamReset):
                raise CallFailed("UNAVAILABLE", f"the server reset the call (HTTP/2 code {event.error_code})")

    def _check_status(self) -> None:
        headers = self._headers
        if "grpc-status" not in headers:
            raise CallFailed("UNAVAILABLE", "the call ended without a status")
        number = headers["grpc-status"]
        code = _CODES[int(number)] if number.isdecimal() and int(number) < len(_CODES) else "UNKNOWN"
        if code != "OK":
            text, details = headers.get(STATUS_DETAILS_KEY, ""), b""
            with suppress(binascii.Error):
                details = base64.b64decode(text + "=" * (-len(text) % 4))  # gRPC sends no padding.
            raise CallFailed(
                code, unquote(headers.get("grpc-message", "")), details, request_id=headers.get(REQUEST_ID_KEY, "")
            )

    def _fill(self, view: memoryview) -> None:
        try:
            while view:
                n_read = self._sock.recv_into(view, len(view), self._wait_all)
                if not n_read:
                    raise CallFailed("UNAVAILABLE", "the connection was closed")
                view = view[n_read:]
        except OSError as exc:
            raise CallFailed("UNAVAILABLE", str(exc)) from exc

    def _send(self, data: bytes) -> None:
        # A server that has answered may be gone before it hears from the client: its answer still counts. If it broke
        # off before, reading will show it.
        with suppress(OSError):
            self._sock.sendall(data)
