"""How servers end: in process, and as real processes that get real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from test_chassis_rpc import outcome

from fix_chassis import SERVICE, eventually

SHUTTING_DOWN = (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
PROGRAM = Path(__file__).parents[1] / "fix_chassis.py"


async def rest_of(call) -> tuple[list[bytes], grpc.aio.AioRpcError | None]:
    """Reads a stream to its end."""
    received = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            received.append(message)
    except grpc.aio.AioRpcError as exc:
        return received, exc
    return received, None


# In process


async def test_watch_ends_with_retry_info_when_the_shutdown_begins(probe_server):
    probe = await probe_server()
    call = probe.stream("Watch", "")
    assert await call.read() == b"snapshot"
    assert await call.read() == b"heartbeat"

    probe.shutdown.begin()
    _, error = await rest_of(call)

    assert outcome(error) == SHUTTING_DOWN
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
    assert info.retry_delay.seconds == 1
    assert probe.probe.seen == ["events closed"]


async def test_calls_in_progress_are_drained(probe_server):
    probe = await probe_server(grace_s=5.0)
    call = asyncio.ensure_future(probe.unary("sleep 0.3"))
    await asyncio.sleep(0.1)

    await probe.server.stop()

    assert (await call).value == "SLEEP 0.3"


async def test_stop_takes_no_longer_than_the_calls(probe_server):
    probe = await probe_server(grace_s=30.0)

    started = time.monotonic()
    await probe.server.stop()

    assert time.monotonic() - started < 1


async def test_streams_beyond_the_drain_are_cut_with_a_reason(probe_server):
    probe = await probe_server(grace_s=2.0)
    generate, write = probe.stream("Generate", "1 wait"), probe.stream("Write", "1 wait")
    await generate.read()
    await write.read()

    started = time.monotonic()
    await probe.server.stop()

    assert time.monotonic() - started < 2
    for call in (generate, write):
        _, error = await rest_of(call)
        assert outcome(error) == SHUTTING_DOWN
    assert probe.probe.seen == ["generate opened", "generate closed"]


async def test_stream_nobody_reads_does_not_hold_up_the_end(probe_server):
    probe = await probe_server(grace_s=2.0)
    call = probe.stream("Generate", "1000000")
    await call.read()

    started = time.monotonic()
    await probe.server.stop()

    assert time.monotonic() - started < 2
    call.cancel()


async def test_handler_that_ignores_cancellation_does_not_hold_up_the_end(probe_server):
    probe = await probe_server(grace_s=2.0)
    call = asyncio.ensure_future(probe.unary("ignore cancellation"))
    await asyncio.sleep(0.1)

    started = time.monotonic()
    await probe.server.stop()

    assert time.monotonic() - started < 2
    probe.probe.stop_ignoring.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await call


async def test_new_calls_during_the_drain_are_refused_with_a_reason(probe_server):
    probe = await probe_server()
    await probe.unary("x")

    probe.shutdown.begin()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await probe.unary("x")
    assert outcome(caught.value) == SHUTTING_DOWN


# As a process


@dataclass
class Process:
    """A probe server as a program."""

    process: subprocess.Popen[str]
    address: str
    ready: Path

    async def end(self, timeout_s: float) -> tuple[int, list[dict[str, Any]], float]:
        """Waits for the exit; returns its code, the JSON lines of the log, and the seconds it took."""
        started = time.monotonic()
        _, log = await asyncio.to_thread(self.process.communicate, timeout=timeout_s)
        took = time.monotonic() - started
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        return self.process.returncode, lines, took

    @asynccontextmanager
    async def stub(self, kind: str, method: str) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            yield getattr(channel, kind)(f"/{SERVICE}/{method}", StringValue.SerializeToString)


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def launch(tmp_path) -> Iterator[Any]:
    launched: list[subprocess.Popen[str]] = []

    async def start(*flags: str) -> Process:
        ready = tmp_path / "ready"
        process = spawn(str(PROGRAM), "--ready-file", str(ready), *flags)
        launched.append(process)
        await eventually(lambda: ready.exists() or process.poll() is not None, timeout_s=30)
        return Process(process, ready.read_text() if ready.exists() else "", ready)

    yield start
    for process in launched:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_an_open_watch_and_the_process(launch, number):
    server = await launch("--grace-s", "20")
    async with server.stub("unary_stream", "Watch") as watch, server.stub("unary_stream", "Generate") as generate:
        call, finishing = watch(StringValue()), generate(StringValue(value="3"))
        assert await call.read() == b"snapshot"
        assert [await finishing.read() for _ in range(3)] == [b"0", b"1", b"2"]
        async with grpc.aio.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING

            server.process.send_signal(number)
            _, error = await rest_of(call)
            states, _ = await rest_of(health)

        assert outcome(error) == SHUTTING_DOWN
        assert [each.status for each in states] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    code, lines, took = await server.end(timeout_s=20)
    assert code == 0
    assert took < 5
    assert not server.ready.exists()
    watched = [line for line in lines if line.get("method") == f"/{SERVICE}/Watch"]
    assert [line["reason"] for line in watched] == ["SHUTTING_DOWN"]


async def test_process_with_a_stream_that_goes_on_exits_within_its_grace(launch):
    server = await launch("--grace-s", "2")
    async with server.stub("unary_stream", "Generate") as generate:
        call = generate(StringValue(value="1 wait"))
        await call.read()

        server.process.terminate()
        code, _, took = await server.end(timeout_s=20)

        assert (code, took < 2.5) == (0, True)
        _, error = await rest_of(call)
        assert outcome(error) == SHUTTING_DOWN


async def test_process_with_a_blocked_loop_exits_within_its_grace(launch):
    server = await launch("--grace-s", "1")
    async with server.stub("unary_unary", "Unary") as unary:
        call = asyncio.ensure_future(unary(StringValue(value="block")))
        await asyncio.sleep(0.3)

        server.process.terminate()
        code, _, took = await server.end(timeout_s=20)

        assert code == 1
        assert 0.5 < took < 2
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_service_that_cleans_up_for_too_long_is_ended_after_the_grace(launch):
    server = await launch("--grace-s", "1", "--clean-up-s", "60")

    server.process.terminate()
    code, _, took = await server.end(timeout_s=20)

    assert code == 1
    assert took < 2


async def test_second_signal_exits_at_once(launch):
    server = await launch("--grace-s", "60")
    async with server.stub("unary_stream", "Generate") as generate:
        call = generate(StringValue(value="1 wait"))
        await call.read()
        server.process.terminate()
        await eventually(lambda: health_is(server.address) != "SERVING")

        server.process.terminate()
        code, _, took = await server.end(timeout_s=20)

        assert code == 128 + signal.SIGTERM
        assert took < 1
        call.cancel()


def health_is(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return "GONE"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_every_line_of_a_servers_log_is_json(launch):
    server = await launch("--log-level", "debug")
    async with server.stub("unary_unary", "Unary") as unary:
        for command in ("x", "missing", "bug"):
            await asyncio.gather(unary(StringValue(value=command)), return_exceptions=True)

    server.process.terminate()
    _, log = await asyncio.to_thread(server.process.communicate, timeout=20)

    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["code"] for line in lines if line["message"] == "rpc"] == ["OK", "NOT_FOUND", "INTERNAL"]


async def test_bad_flags_are_refused_with_a_usage_message(launch, tmp_path):
    half = await launch("--tls-cert", str(tmp_path / "x"))
    assert "--tls-key" in half.process.communicate(timeout=20)[1]

    short = await launch("--grace-s", "0")
    assert "0.5 to 3600" in short.process.communicate(timeout=20)[1]

    exposed = await launch("--listen", "0.0.0.0:0")
    assert "--insecure" in exposed.process.communicate(timeout=20)[1]


async def test_flags_become_options(launch, tmp_path):
    token = tmp_path / "token"
    token.write_text("x" * 32)
    server = await launch("--listen", "127.0.0.1:0", "--token-file", str(token), "--metrics-listen", "127.0.0.1:0")

    async with server.stub("unary_unary", "Unary") as unary:
        answer = await unary(StringValue(value="x"), metadata=(("authorization", f"Bearer {'x' * 32}"),))
        assert StringValue.FromString(answer).value == "X"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(StringValue(value="x"))
    assert outcome(caught.value) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
    assert os.environ.get("HEADRACE_TOKEN") is None


# Clients that hang

HANGING_CLIENT = f"""
import sys
import grpc
from google.protobuf.wrappers_pb2 import StringValue

with grpc.insecure_channel(sys.argv[1]) as channel:
    for _ in channel.unary_stream("/{SERVICE}/Generate")(StringValue(value="1 wait").SerializeToString()):
        print("reading", flush=True)
"""


async def test_client_whose_machine_hangs_is_noticed(probe_server):
    probe = await probe_server(keepalive_s=1.5)
    client = spawn("-c", HANGING_CLIENT, probe.server.address)
    try:
        await asyncio.to_thread(client.stdout.readline)
        client.send_signal(signal.SIGSTOP)

        await eventually(lambda: "generate closed" in probe.probe.seen, timeout_s=10)
        (line,) = await probe.rpc_lines()
        assert line["code"] in ("CANCELLED", "UNAVAILABLE")
    finally:
        client.kill()
        client.communicate()


async def test_client_that_pings_as_often_as_agreed_is_not_sent_away(probe_server):
    probe = await probe_server(keepalive_s=0.6)
    arguments = [
        ("grpc.keepalive_time_ms", 300),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(probe.server.address, options=arguments) as channel:
        call = channel.unary_stream(f"/{SERVICE}/Generate")(StringValue(value="1 wait").SerializeToString())
        await call.read()
        await asyncio.sleep(3.5)  # grpc pings once a second at most; the third too early ends the connection.

        assert not call.done()
        call.cancel()
