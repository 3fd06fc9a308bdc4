"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from headrace_chassis.metrics_http import MetricsPage, Protection

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
        self._page: MetricsPage | None = None
        self._failures = Counter(
            "headrace_loop_failures", "Rounds of a loop that failed unexpectedly.", ["loop"], registry=self.registry
        )

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

    def loop_failed(self, loop: str) -> None:
        """Counts a round of a loop that failed with an error that nothing foresaw."""
        self._failures.labels(loop).inc()

    def serve(self, listen: str, protection: Protection) -> str:
        """Serves `/metrics` over HTTP on `HOST:PORT` from a thread; returns the address with the port bound."""
        self._page = MetricsPage(self.registry, listen, protection)
        return self._page.address

    def close(self) -> None:
        """Stops serving; a second call is no error."""
        page, self._page = self._page, None
        if page is not None:
            page.close()
