"""The page of metrics over HTTP; beyond loopback over HTTPS, for callers with the server's token."""

from __future__ import annotations

import contextlib
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from headrace_chassis.auth import Tls, TokenGate, is_loopback, split_address
from headrace_chassis.errors import ListenFailed, TokenInvalid

_MAX_REQUESTS = 16  # At once. A monitoring server or two ask every few seconds.
_REQUEST_S = 10.0  # Each read and write of a request.
# A whole request: one that comes byte by byte must not hold its place.
_WHOLE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """The server's token and certificate, which its metrics share. On loopback they are asked for neither."""

    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None


class MetricsPage:
    """Serves `registry` as `/metrics` on `listen`, HOST:PORT, from threads, until `close`. Raises ListenFailed."""

    def __init__(self, registry: CollectorRegistry, listen: str, protection: Protection) -> None:
        host, port = split_address(listen, flag="--metrics-listen")
        open_to_all = is_loopback(listen)
        app = make_wsgi_app(registry)
        if protection.token is not None and not open_to_all:
            app = _gated(app, TokenGate(protection.token))
        try:
            found = socket.getaddrinfo(host or "::", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            kind: type[_Server] = type("MetricsServer", (_Server,), {"address_family": found[0][0]})
            self._server: Any = make_server(host or "::", port, app, kind, _Handler)
        except OSError as exc:
            raise ListenFailed(
                f"Can't serve metrics on {listen} ({exc}); choose another address with --metrics-listen."
            ) from exc
        if protection.tls is not None and not open_to_all:
            # The handshake is left to each request's thread: a silent peer must not hold up the others.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            with (
                tempfile.TemporaryDirectory() as folder
            ):  # OpenSSL takes files only; nobody else may enter this folder.
                cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
                cert.write_bytes(protection.tls.cert)
                key.write_bytes(protection.tls.key)
                context.load_cert_chain(cert, key)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        bound = self._server.server_port
        self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the method it replaces.
        """Logs nothing: a line for each look would drown the others."""


class _Server(ThreadingWSGIServer):
    def __init__(self, *args: Any, **more: Any) -> None:
        self._free = threading.Semaphore(_MAX_REQUESTS)
        super().__init__(*args, **more)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        def hang_up() -> None:
            with contextlib.suppress(OSError, ValueError):  # It has ended meanwhile.
                request.shutdown(socket.SHUT_RDWR)

        cut = threading.Timer(_WHOLE_S, hang_up)
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that broke off, or spoke no TLS."""


def _gated(app: Callable[..., Iterable[bytes]], gate: TokenGate) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        try:
            gate.check([("authorization", environ.get("HTTP_AUTHORIZATION", ""))])
        except TokenInvalid as exc:
            status = HTTPStatus.UNAUTHORIZED
            start(f"{status.value} {status.phrase}", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
            return [exc.message.encode()]
        return app(environ, start)

    return answer
