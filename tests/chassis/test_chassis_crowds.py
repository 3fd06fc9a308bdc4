"""Callers that take all they can get: health watches, calls without a token, bursts of calls, silent connections."""

import asyncio
import contextlib
import socket
import struct

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from test_chassis_rpc import outcome, refusal

from fix_chassis import SERVICE, TOKEN, eventually
from headrace_chassis import descriptors
from headrace_chassis.connections import Connections
from headrace_chassis.places import MAX_HEALTH_WATCHES_OF_A_HOST

BEARER = (("authorization", f"Bearer {TOKEN}"),)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">HBBBI", 0, 0, 4, 0, 0)  # And empty settings.


def watching(channel):
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())


async def test_a_thousand_health_watches_without_a_token_take_nothing_from_calls_with_one(probe_server):
    probe = await probe_server(token=TOKEN)
    watches = [watching(probe.channel) for _ in range(1000)]

    answers = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)

    served = [one for one in answers if isinstance(one, health_pb2.HealthCheckResponse)]
    refused = {outcome(one) for one in answers if isinstance(one, grpc.aio.AioRpcError)}
    assert len(served) == MAX_HEALTH_WATCHES_OF_A_HOST
    assert refused == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")}
    assert (await probe.unary("x", metadata=BEARER, timeout=5)).value == "X"
    stream = probe.stream("Generate", "1 wait", metadata=BEARER)
    assert await stream.read() == b"0"
    check = health_pb2_grpc.HealthStub(probe.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert (await check).status == health_pb2.HealthCheckResponse.SERVING
    stream.cancel()
    for watch in watches:
        watch.cancel()


async def test_a_health_watch_that_ends_gives_its_place_back(probe_server):
    probe = await probe_server()
    watches = [watching(probe.channel) for _ in range(MAX_HEALTH_WATCHES_OF_A_HOST)]
    for watch in watches:
        await watch.read()
    assert (await refusal(watching(probe.channel)))[1] == "TOO_MANY_STREAMS"

    for watch in watches:
        watch.cancel()
    await probe.rpc_lines(MAX_HEALTH_WATCHES_OF_A_HOST + 1)

    again = watching(probe.channel)
    assert (await again.read()).status == health_pb2.HealthCheckResponse.SERVING
    again.cancel()


async def test_a_call_without_the_token_takes_no_place(probe_server):
    probe = await probe_server(token=TOKEN, max_concurrent_rpcs=1)
    slow = asyncio.ensure_future(probe.unary("sleep 0.5", metadata=BEARER))
    await asyncio.sleep(0.1)

    assert (await refusal(probe.unary("x")))[1] == "TOKEN_INVALID"
    assert (await refusal(probe.unary("x", metadata=BEARER)))[1] == "QUEUE_FULL"
    await slow


async def test_every_call_of_a_burst_beyond_all_limits_is_answered_or_told_when_to_come_back(probe_server):
    probe = await probe_server(max_concurrent_rpcs=100)
    alone = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(probe.server.address, options=alone) for _ in range(10)]
    method = f"/{SERVICE}/Unary"

    async def outcome_of(call) -> str:
        try:
            await call
        except grpc.aio.AioRpcError as exc:
            status = rpc_status.from_call(exc)
            info = error_details_pb2.RetryInfo()
            told = status is not None and any(detail.Unpack(info) for detail in status.details)
            return f"{exc.code().name} {outcome(exc)[1]} {'retry' if told else exc.details()}"
        return "OK"

    # An argument "sleep 0.2" as it is serialized.
    calls = [channel.unary_unary(method)(b"\n\tsleep 0.2", timeout=30) for channel in channels for _ in range(300)]
    outcomes = await asyncio.gather(*map(outcome_of, calls))

    assert set(outcomes) == {"OK", "RESOURCE_EXHAUSTED QUEUE_FULL retry"}
    assert outcomes.count("OK") >= 100
    for channel in channels:
        await channel.close()


# -- connections -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_connections(address, n, *, first=b""):
    """Holds connections on which nothing is sent but `first`; yields them."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_connected(host, int(port), first)) for _ in range(n)]


def _connected(host, port, first):
    one = socket.create_connection((host, port), timeout=5)
    with contextlib.suppress(OSError):  # Beyond the bound the server hangs up at once.
        one.sendall(first)
    return one


@pytest.mark.parametrize("first", [b"", PREFACE], ids=["no byte", "no call"])
async def test_silent_connections_make_room_for_a_caller_with_the_token(probe_server, first):
    probe = await probe_server(token=TOKEN, max_connections=20, silence_s=0.5)
    assert (await probe.unary("x", metadata=BEARER, timeout=5)).value == "X"

    with open_connections(probe.server.address, 40, first=first):
        assert (await probe.unary("x", metadata=BEARER, timeout=5)).value == "X"
        await eventually(lambda: "silent connections" in probe.log.getvalue())
        async with grpc.aio.insecure_channel(
            probe.server.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as newcomer:
            call = newcomer.unary_unary(f"/{SERVICE}/Unary")(
                b"\n\x01x", metadata=BEARER, timeout=10, wait_for_ready=True
            )
            assert await call == b"\n\x01X"
    # The first connection was silent for longer than the others, and has made a call with the token.
    assert not any(line["reason"] for line in await probe.rpc_lines(3))


async def test_a_stream_under_way_keeps_its_connection(probe_server):
    probe = await probe_server(max_connections=4, silence_s=0.01)
    stream = probe.stream("Generate", "1 wait")
    await stream.read()
    port, runner = int(probe.server.address.rpartition(":")[2]), probe.server._runner
    connections = Connections(port=port, most=0, silence_s=0.0, busy_peers=lambda: runner.busy_peers)

    assert connections.look(runner.busy_peers) == 0
    with open_connections(probe.server.address, 1):
        await eventually(lambda: connections.look(runner.busy_peers) == 1)
    stream.cancel()


def test_peers_that_have_gone_are_forgotten():
    connections = Connections(port=1, most=10, silence_s=5.0, busy_peers=set)
    for port in range(1000):
        connections.heard(f"ipv4:127.0.0.1:{port}")

    assert connections.look(set()) == 0
    assert not connections._heard


async def test_connections_beyond_the_bound_are_closed_at_once(probe_server):
    probe = await probe_server(max_connections=5, silence_s=60)

    with open_connections(probe.server.address, 12, first=PREFACE) as connections:
        await asyncio.sleep(0.5)
        answers = await asyncio.to_thread(lambda: [_says_something(one) for one in connections])

    assert sum(map(bool, answers)) == 5


def _says_something(one):
    with contextlib.suppress(OSError):
        return one.recv(1)
    return b""


def test_half_of_the_descriptors_stay_for_files(monkeypatch):
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _which: (300, 300))

    assert descriptors.most_connections(2000) == 100
    assert descriptors.most_connections(50) == 50
