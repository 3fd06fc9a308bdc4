"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from headrace_chassis.auth import split_address
from headrace_chassis.errors import ListenFailed

# From the read of one row (1 ms) to a stream of hours.
_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0, 1800.0, 7200.0)


class Metrics:
    """The metrics of one server. A service registers its own collectors in `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._rpcs = Counter("headrace_rpcs", "RPCs finished.", ["method", "code"], registry=self.registry)
        self._seconds = Histogram(
            "headrace_rpc_seconds",
            "Time from the first byte of an RPC to its status.",
            ["method", "code"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._streams = Gauge("headrace_streams_open", "Streaming RPCs open.", ["method"], registry=self.registry)
        self._bytes = Counter("headrace_bytes_sent", "Payload bytes sent.", ["method"], registry=self.registry)
        self._rows = Counter("headrace_rows_sent", "Activation rows sent.", ["method"], registry=self.registry)
        self._http: tuple[WSGIServer, threading.Thread] | None = None

    def rpc_finished(self, method: str, code: str, seconds: float) -> None:
        """Counts one finished RPC."""
        self._rpcs.labels(method, code).inc()
        self._seconds.labels(method, code).observe(seconds)

    @contextmanager
    def stream_open(self, method: str) -> Iterator[None]:
        """Counts a stream as open for the time of a `with` block."""
        gauge = self._streams.labels(method)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def sent(self, method: str, n_bytes: int, n_rows: int = 0) -> None:
        """Counts payload sent by `method`, a full name such as `/package.Service/Method`."""
        self._bytes.labels(method).inc(n_bytes)
        self._rows.labels(method).inc(n_rows)

    def serve(self, listen: str) -> str:
        """Serves `/metrics` over HTTP on `HOST:PORT` from a thread; returns the address with the port bound."""
        host, port = split_address(listen, flag="--metrics-listen")
        try:
            self._http = start_http_server(port, host or "::", registry=self.registry)
        except OSError as exc:
            raise ListenFailed(
                f"Can't serve metrics on {listen} ({exc}); choose another address with --metrics-listen."
            ) from exc
        bound = self._http[0].server_port
        return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    def close(self) -> None:
        """Stops serving; a second call is no error."""
        if self._http is None:
            return
        (server, thread), self._http = self._http, None
        server.shutdown()
        server.server_close()
        thread.join(timeout=5.0)
