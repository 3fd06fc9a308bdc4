"""A gRPC server from start to exit: bind, serve, announce the end, drain, exit within the grace.

SIGTERM → health NOT_SERVING → watches end with SHUTTING_DOWN → calls in progress drain → the rest is cut with
SHUTTING_DOWN → exit. A second signal exits at once. A process that still runs after the grace is ended from outside
the event loop, so that blocked code can't keep it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from headrace_chassis.accepting import accepting_server
from headrace_chassis.auth import TokenGate, is_unix, require_safe, split_address
from headrace_chassis.connections import Connections
from headrace_chassis.descriptors import most_connections
from headrace_chassis.errors import AddressInvalid, ListenFailed, ReadyFileInvalid
from headrace_chassis.health import Health
from headrace_chassis.interceptor import ChassisInterceptor
from headrace_chassis.metrics import Metrics
from headrace_chassis.metrics_http import Protection
from headrace_chassis.options import ServerOptions
from headrace_chassis.places import Limits, OwnPlaces, Places
from headrace_chassis.reflection import add_reflection
from headrace_chassis.rpc import RpcRunner
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.status import StatusTable

__all__ = ["Server", "ServerOptions"]

_HEALTH = "grpc.health.v1.Health"
# Part of the grace kept for the steps after the drain: cutting calls, and the service's own cleaning up.
_RESERVE_S = 2.0
# Long enough to send NOT_SERVING to health watchers before their stream is cut.
_FAREWELL_S = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Up to this multiple of `max_receive_bytes` the server reads and drops an oversized request and answers
# MESSAGE_TOO_LARGE; beyond it grpc itself answers RESOURCE_EXHAUSTED, without a reason.
_TYPED_REFUSAL_FACTOR = 4
# gRPC's own limits, likewise without a reason, lie this many calls above ours: they only hold if ours fail. A burst of
# calls that are refused, each with its reason, needs room too.
_SPARE_RPCS = 10_000
# Streams of one connection, for each call that may be in progress. gRPC refuses more, without a reason, and counts
# calls for a moment after they have ended: so many are more than callers need, and still bound a flood of resets.
_STREAMS_A_CALL = 2
# A connection that has not sent its first HTTP/2 frames by then is closed; TLS over slow lines takes a second or two.
_HANDSHAKE_MS = 10_000
# A connection without calls for so long is closed; clients open another at their next call.
_IDLE_MS = 10 * 60_000


class Server:
    """Serves the servicers that `add_services` registers, with health and reflection, until a signal or the shutdown.

    `await start()`, `await wait()`, `await stop()`, all on one event loop. Signals are caught only in the main thread.
    """

    def __init__(
        self,
        options: ServerOptions,
        *,
        service_names: Sequence[str],
        add_services: Callable[[grpc.aio.Server], None],
        statuses: StatusTable,
        metrics: Metrics,
        shutdown: Shutdown,
        handle_signals: bool = True,
        own_places: Sequence[OwnPlaces] = (),
    ) -> None:
        self._options = options
        self._names = tuple(service_names)
        self._add_services = add_services
        self._metrics = metrics
        self._shutdown = shutdown
        self._health = Health()
        limits = Limits(max_rpcs=options.max_concurrent_rpcs, max_streams=options.max_streams)
        self._runner = RpcRunner(
            statuses=statuses,
            metrics=metrics,
            shutdown=shutdown,
            places=Places(limits, own_places),
            heard=lambda peer: self._connections.heard(peer) if self._connections is not None else None,
        )
        self._connections: Connections | None = None
        self._looking: asyncio.Task[None] | None = None
        self._signals = _Signals(options.grace_s) if handle_signals else None
        self._grpc: grpc.aio.Server | None = None
        self._ended_by: BaseException | None = None
        self.address = ""
        self.metrics_address = ""

    async def start(self) -> None:
        """Binds, serves and sets `address`. Raises StartError and then leaves nothing behind."""
        options = self._options
        require_safe(options.listen, protected=options.protected, insecure=options.insecure)
        if options.metrics_listen is not None:
            require_safe(
                options.metrics_listen,
                protected=options.protected,
                insecure=options.insecure,
                flag="--metrics-listen",
            )
            self.metrics_address = self._metrics.serve(
                options.metrics_listen, Protection(token=options.token, tls=options.tls)
            )

        def ended(error: BaseException) -> None:
            self._ended_by = error
            self._shutdown.begin()

        try:
            interceptor = ChassisInterceptor(
                runner=self._runner, gate=TokenGate(options.token), max_receive_bytes=options.max_receive_bytes
            )
            server = accepting_server(
                [interceptor],
                options=_arguments(options),
                max_rpcs=options.max_concurrent_rpcs + _SPARE_RPCS,
                on_end=ended,
            )
            self._add_services(server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            add_reflection((*self._names, _HEALTH), server)
            self.address = _bind(server, options)
            self._grpc = server
            await server.start()
            self._watch_connections()
            for name in ("", *self._names):
                self.set_health(name, serving=True)
            if self._signals is not None:
                self._signals.catch(asyncio.get_running_loop(), self._announce)
            self._write_ready_file()
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> None:
        """Returns when the shutdown has begun, by a signal or by `Shutdown.begin`. Raises if gRPC ended by itself."""
        await self._shutdown.wait()
        if self._ended_by is not None:  # A process that hears no calls must not stay.
            raise RuntimeError("gRPC's server has ended") from self._ended_by

    async def stop(self) -> None:
        """Drains, cuts the remaining calls and closes, in less than the grace. A second call is no error."""
        reserve_s = min(_RESERVE_S, self._options.grace_s / 2)
        drain_s, cut_s = self._options.grace_s - reserve_s, reserve_s / 2
        server, self._grpc = self._grpc, None
        self._announce()
        if server is not None:
            # Refuses new calls at once and ends when the last call does; the cuts below bring that about in time.
            stopping = asyncio.create_task(server.stop(drain_s + cut_s / 2))
            await asyncio.wait({stopping}, timeout=min(_FAREWELL_S, drain_s))
            self._runner.cut(infrastructure_only=True)
            await asyncio.wait({stopping}, timeout=drain_s)
            if not stopping.done():
                self._runner.cut(infrastructure_only=False)
                await asyncio.wait({stopping}, timeout=cut_s)
            stopping.cancel()  # By now only a handler that ignores its cancellation is left.
        if self._looking is not None:
            self._looking.cancel()
        self._metrics.close()
        if self._signals is not None:
            self._signals.release()
        if self._options.ready_file is not None:
            self._options.ready_file.unlink(missing_ok=True)

    def set_health(self, service: str, *, serving: bool) -> None:
        """Tells health checks whether a service can do its work; the empty name is the server as a whole."""
        self._health.set(service, serving=serving)

    def _watch_connections(self) -> None:
        if is_unix(self.address):  # Only programs of this machine connect there, and gRPC's bound holds for them.
            return
        self._connections = Connections(
            port=split_address(self.address)[1],
            most=most_connections(self._options.max_connections),
            silence_s=self._options.silence_s,
            busy_peers=lambda: self._runner.busy_peers,
        )
        self._looking = asyncio.create_task(self._connections.run(), name="connections")

    def _write_ready_file(self) -> None:
        path = self._options.ready_file
        if path is None:
            return
        try:
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.write_text(self.address, encoding="utf-8")
            draft.replace(path)
        except OSError as exc:
            raise ReadyFileInvalid(f"Can't write {path} ({exc}); give --ready-file a writable place.") from exc

    def _announce(self) -> None:
        """Tells health checks that the server goes away, then begins the shutdown."""
        self._health.end()
        self._shutdown.begin()


class _Signals:
    """Turns the first signal into a callback on the loop, and the second into the end of the process."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._seen = False
        self._previous: dict[signal.Signals, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._callback: Callable[[], None] | None = None

    def catch(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        """Starts catching; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop, self._callback = loop, callback
        # Not loop.add_signal_handler: the second signal must work while the loop is blocked.
        self._previous = {each: signal.signal(each, self._on_signal) for each in _SIGNALS}

    def release(self) -> None:
        """Stops catching, unless a signal has come: a second signal must still end a slow exit."""
        previous, self._previous = self._previous, {}
        if self._seen:
            return
        for each, handler in previous.items():
            if signal.getsignal(each) == self._on_signal:
                signal.signal(each, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._seen:
            os._exit(128 + number)
        self._seen = True
        # faulthandler's thread is C code: neither a blocked loop nor a held GIL keeps the process beyond its grace.
        faulthandler.dump_traceback_later(self._grace_s, exit=True, file=sys.stderr)
        if self._loop is not None and self._callback is not None:
            self._loop.call_soon_threadsafe(self._callback)


def _bind(server: grpc.aio.Server, options: ServerOptions) -> str:
    if not is_unix(options.listen):
        split_address(options.listen)
    elif options.listen.rstrip("/").endswith(":"):
        raise AddressInvalid(f"{options.listen!r} names no socket; --listen takes unix:PATH.")
    try:
        if options.tls is None:
            port = server.add_insecure_port(options.listen)
        else:
            pair = (options.tls.key, options.tls.cert)
            port = server.add_secure_port(options.listen, grpc.ssl_server_credentials([pair]))
    except RuntimeError as exc:
        raise ListenFailed(
            f"Can't listen on {options.listen}: it is in use, or no address of this machine; choose another --listen."
        ) from exc
    return options.listen if is_unix(options.listen) else f"{options.listen.rpartition(':')[0]}:{port}"


def _arguments(options: ServerOptions) -> tuple[tuple[str, int], ...]:
    keepalive_ms = round(options.keepalive_s * 1000)
    return (
        ("grpc.max_receive_message_length", options.max_receive_bytes * _TYPED_REFUSAL_FACTOR),
        ("grpc.max_send_message_length", options.max_send_bytes),
        ("grpc.max_concurrent_streams", max(options.max_concurrent_rpcs, 1000) * _STREAMS_A_CALL),
        ("grpc.server.max_pending_requests", options.max_concurrent_rpcs + _SPARE_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", options.max_concurrent_rpcs + _SPARE_RPCS),
        ("grpc.max_allowed_incoming_connections", most_connections(options.max_connections)),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms // 3),
        ("grpc.http2.ping_timeout_ms", keepalive_ms // 3),  # Without this line the timeout stays at a minute.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # No limit: a watch may be silent, and its client gone, for long.
        # Clients ping every 30 s too; by default grpc takes pings less than 5 minutes apart for abuse and hangs up.
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 3),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.so_reuseport", 0),  # Two servers on one port are an error, not a lottery.
    )
