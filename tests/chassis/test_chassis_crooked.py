"""Callers that speak HTTP/2 as no client of gRPC does: names that are no text, no message, a closed window."""

import asyncio
import contextlib
import socket
import struct

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fix_chassis import SERVICE, TOKEN, eventually
from headrace_chassis import interceptor, metrics_http
from headrace_chassis.places import MAX_HEALTH_CHECKS_OF_A_HOST

BEARER = (("authorization", f"Bearer {TOKEN}"),)
CHECK, WATCH = b"/grpc.health.v1.Health/Check", b"/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Caller:
    """One connection without gRPC; it reads no more than `window` bytes of an answer."""

    def __init__(self, address, *, window=65535):
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5)
        crooked = {"validate_outbound_headers": False, "normalize_outbound_headers": False}
        self.http2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None, **crooked))
        sizes = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        self.http2.local_settings = h2.settings.Settings(client=True, initial_values=sizes)
        self.http2.initiate_connection()
        self.socket.sendall(self.http2.data_to_send())

    def call(self, path, message=None, *, end=False, more=()):
        """Sends the headers of a call, and its message if there is one."""
        stream = self.http2.get_next_available_stream_id()
        headers = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers"}
        self.http2.send_headers(stream, [*headers.items(), (b"content-type", b"application/grpc"), *more])
        if message is not None:
            self.http2.send_data(stream, struct.pack(">BI", 0, len(message)) + message)
        if end:
            self.http2.end_stream(stream)
        self.socket.sendall(self.http2.data_to_send())

    def statuses(self, n):
        """Returns the gRPC status of the first `n` calls that end."""
        found = []
        while len(found) < n:
            data = self.socket.recv(65536)
            assert data, "the server hung up"
            for event in self.http2.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    found += [int(value) for name, value in event.headers if name == b"grpc-status"]
            self.socket.sendall(self.http2.data_to_send())
        return found


@contextlib.asynccontextmanager
async def caller(address, **options):
    one = await asyncio.to_thread(Caller, address, **options)
    with one.socket:
        yield one


@pytest.mark.parametrize("path", [b"/\xff\xfe/x", b"\xff", f"/{SERVICE}/Unary".encode() + b"\xc3"])
async def test_a_method_whose_name_is_no_text_is_refused_and_ends_no_server(probe_server, path):
    probe = await probe_server(token=TOKEN)

    async with caller(probe.server.address) as crooked:
        crooked.call(path, b"", end=True)
        assert await asyncio.to_thread(crooked.statuses, 1) == [16]  # UNAUTHENTICATED, as for every method.
    assert (await probe.unary("x", metadata=BEARER, timeout=5)).value == "X"


async def test_a_token_with_a_stray_byte_is_refused_and_in_no_log(probe_server):
    probe = await probe_server(token=TOKEN)

    async with caller(probe.server.address) as crooked:
        header = (b"authorization", f"Bearer {TOKEN}".encode() + b"\xa0")
        crooked.call(f"/{SERVICE}/Unary".encode(), b"", end=True, more=[header])
        assert await asyncio.to_thread(crooked.statuses, 1) == [16]
    assert (await probe.rpc_lines())[0]["reason"] == "TOKEN_INVALID"
    ours = [
        line for line in probe.lines() if line["logger"] != "hpack.hpack"
    ]  # The caller's, which is in this process.
    assert ours
    assert TOKEN not in str(ours)


async def test_a_request_for_metrics_that_comes_byte_by_byte_is_cut(probe_server, monkeypatch):
    monkeypatch.setattr(metrics_http, "_WHOLE_S", 0.5)
    probe = await probe_server(metrics_listen="127.0.0.1:0")
    host, _, port = probe.server.metrics_address.rpartition(":")

    def dribble():
        with socket.create_connection((host, int(port)), timeout=5) as slow, contextlib.suppress(ConnectionError):
            slow.settimeout(0.1)
            for _ in range(40):
                slow.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    return slow.recv(1)
        return b""

    async with asyncio.timeout(3):
        assert await asyncio.to_thread(dribble) == b""


async def test_a_server_whose_loop_over_calls_ends_does_not_go_on_as_if_it_served(probe_server):
    probe = await probe_server()
    failed = asyncio.get_running_loop().create_future()
    failed.set_exception(OSError("no more"))

    probe.server._grpc._server._serving_task_crash_handler(failed)

    with pytest.raises(RuntimeError, match="has ended"):
        await asyncio.wait_for(probe.server.wait(), 5)


async def test_checks_without_a_message_take_nothing_from_other_calls_and_end(probe_server, monkeypatch):
    monkeypatch.setattr(interceptor, "_HEALTH_REQUEST_S", 2.0)
    probe = await probe_server(token=TOKEN, max_concurrent_rpcs=2)
    n_calls = MAX_HEALTH_CHECKS_OF_A_HOST + 10

    async with caller(probe.server.address) as crooked:
        await asyncio.to_thread(lambda: [crooked.call(CHECK) for _ in range(n_calls)])
        # 8 is RESOURCE_EXHAUSTED, and the answer to the calls beyond the bound.
        assert await asyncio.to_thread(crooked.statuses, 10) == [8] * 10
        assert (await probe.unary("x", metadata=BEARER, timeout=5)).value == "X"
        # 3 is INVALID_ARGUMENT.
        assert await asyncio.to_thread(crooked.statuses, n_calls - 10) == [3] * (n_calls - 10)
    check = health_pb2_grpc.HealthStub(probe.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert (await check).status == SERVING


async def test_a_call_whose_message_does_not_come_holds_a_place_and_ends(probe_server, monkeypatch):
    monkeypatch.setattr(interceptor, "_REQUEST_S", 0.5)
    probe = await probe_server()

    async with caller(probe.server.address) as crooked:
        crooked.call(f"/{SERVICE}/Unary".encode())
        await eventually(lambda: len(probe.server._runner.busy_peers) == 1)
        crooked.call(f"/{SERVICE}/Unary".encode(), end=True)
        assert await asyncio.to_thread(crooked.statuses, 2) == [3, 3]
    lines = await probe.rpc_lines(2)
    assert [line["reason"] for line in lines] == ["FIELD_INVALID"] * 2


async def test_a_health_watcher_that_does_not_read_holds_up_no_other_one(probe_server):
    probe = await probe_server()

    async with caller(probe.server.address, window=0) as silent:
        silent.call(WATCH, b"", end=True)
        await eventually(lambda: len(probe.server._runner._active) == 1)
        watch = health_pb2_grpc.HealthStub(probe.channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
        assert (await watch.read()).status == SERVING
        probe.server.set_health("", serving=False)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
