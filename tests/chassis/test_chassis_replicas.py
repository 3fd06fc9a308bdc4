"""Calls from one server to another: in turn, within the caller's deadline, never with a token in clear."""

import asyncio
import time

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from fix_chassis import SERVICE, TOKEN
from fix_ways import Listener, elsewhere
from headrace_chassis.auth import read_tls
from headrace_chassis.deadline import current_deadline
from headrace_chassis.dialing import Credentials, addresses_of, read_roots
from headrace_chassis.errors import AddressInvalid, TlsFileInvalid
from headrace_chassis.loops import going_on
from headrace_chassis.replicas import Replicas

NOWHERE = "127.0.0.1:9"
PLAIN = Credentials()


async def asked(replicas, text="x", *, deadline_s=5.0, metadata=()):
    """Has the probe's server say a word in capitals."""

    async def call(channel, timeout_s):
        method = channel.unary_unary(
            f"/{SERVICE}/Unary", StringValue.SerializeToString, response_deserializer=StringValue.FromString
        )
        return (await method(StringValue(value=text), timeout=timeout_s, metadata=metadata)).value

    return await replicas.answer(call, deadline_s=deadline_s)


@pytest.fixture
def make_replicas():
    made = []

    def make(*addresses, credentials=PLAIN):
        made.append(Replicas(addresses, credentials))
        return made[-1]

    return make


async def test_a_call_waits_for_a_server_that_is_coming_back(probe_server, make_replicas):
    probe = await probe_server()
    replicas = make_replicas(probe.server.address)
    assert await asked(replicas) == "X"
    await probe.server.stop()
    with pytest.raises(grpc.aio.AioRpcError):
        await asked(replicas, deadline_s=1.0)

    async def back():
        await asyncio.sleep(1.0)
        return await probe_server(listen=probe.server.address)

    coming, began = asyncio.create_task(back()), time.monotonic()
    assert await asked(replicas, deadline_s=10.0) == "X"
    assert time.monotonic() - began < 4  # The server's second, and no more than a second of backoff.
    await coming
    await replicas.close()


async def test_a_server_that_stays_away_is_named_at_the_deadline(make_replicas):
    replicas, began = make_replicas(NOWHERE), time.monotonic()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked(replicas, deadline_s=1.5)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert 1.0 < time.monotonic() - began < 3
    await replicas.close()


async def test_the_wait_ends_before_the_caller_of_this_server_gives_up(make_replicas):
    replicas, began = make_replicas(NOWHERE), time.monotonic()
    mark = current_deadline.set(asyncio.get_running_loop().time() + 1.5)

    with pytest.raises(grpc.aio.AioRpcError):
        await asked(replicas, deadline_s=30.0)

    assert time.monotonic() - began < 1.5
    current_deadline.reset(mark)
    await replicas.close()


async def test_a_call_under_way_carries_its_deadline_to_the_calls_it_makes(probe_server):
    probe = await probe_server()

    assert (await probe.unary("deadline", timeout=7)).value == "7"


async def test_replicas_are_asked_in_turn_and_the_one_that_answered_again(probe_server, make_replicas):
    first, second = await probe_server(), await probe_server()
    replicas = make_replicas(NOWHERE, first.server.address, second.server.address)

    assert await asked(replicas) == "X"
    assert replicas.address == first.server.address
    await first.server.stop()
    assert await asked(replicas) == "X"
    assert replicas.address == second.server.address
    await replicas.close()


async def test_a_replica_that_hangs_leaves_time_for_the_next(probe_server, make_replicas, listeners):
    probe = await probe_server()
    replicas = make_replicas(f"127.0.0.1:{listeners(Listener).port}", probe.server.address)

    assert await asked(replicas, deadline_s=8.0) == "X"
    await replicas.close()


async def test_an_error_of_the_server_is_no_reason_to_ask_another(probe_server, make_replicas):
    first, second = await probe_server(), await probe_server()
    replicas = make_replicas(first.server.address, second.server.address)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked(replicas, "missing")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert replicas.address == first.server.address
    await replicas.close()


async def test_loopback_never_leads_through_a_proxy(probe_server, make_replicas, proxied):
    proxied(9)
    probe = await probe_server()
    replicas = make_replicas(probe.server.address)

    assert await asked(replicas) == "X"
    await replicas.close()


async def test_servers_reach_each_other_over_a_unix_socket(probe_server, make_replicas, tmp_path):
    probe = await probe_server(listen=f"unix:{tmp_path}/s", token=TOKEN)
    replicas = make_replicas(probe.server.address, credentials=Credentials(token=TOKEN))

    assert await asked(replicas, metadata=(("authorization", f"Bearer {TOKEN}"),)) == "X"
    await replicas.close()


# -- TLS ---------------------------------------------------------------------------------------------------------------


async def hint_of(replicas):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked(replicas, deadline_s=2.0)
    hint = await replicas.hint(caught.value, replicas.address)
    await replicas.close()
    return hint


async def test_a_server_with_tls_is_told_from_one_that_is_away(probe_server, make_replicas, identity):
    tls = read_tls(*identity)
    probe = await probe_server(tls=tls, credentials=grpc.ssl_channel_credentials(tls.cert))

    assert "--registry-ca" in await hint_of(
        make_replicas(probe.server.address, credentials=Credentials(ca_flag="--registry-ca"))
    )
    assert await hint_of(make_replicas(NOWHERE)) == ""


async def test_a_server_without_tls_is_told_from_one_that_is_away(probe_server, make_replicas, identity):
    probe = await probe_server()
    roots = read_roots(identity[0], flag="--registry-ca")

    assert "speaks no TLS" in await hint_of(
        make_replicas(probe.server.address, credentials=Credentials(root_certificates=roots))
    )


async def test_a_token_never_goes_out_in_clear_beyond_this_machine(listeners, make_replicas):
    listener = listeners(Listener)
    replicas = make_replicas(elsewhere(listener.port), credentials=Credentials(token=TOKEN))

    with pytest.raises(grpc.aio.AioRpcError):
        await asked(replicas, deadline_s=2.0, metadata=(("authorization", f"Bearer {TOKEN}"),))

    assert listener.received
    assert TOKEN.encode() not in listener.received
    await replicas.close()


def test_a_file_without_a_certificate_is_refused_naming_the_flag(tmp_path):
    (tmp_path / "empty.pem").write_text("nothing")

    for file in ("empty.pem", "missing.pem"):
        with pytest.raises(TlsFileInvalid, match="--registry-ca"):
            read_roots(tmp_path / file, flag="--registry-ca")


def test_addresses_of_replicas_are_checked():
    assert addresses_of("ipv4:127.0.0.1:1,127.0.0.1:2", flag="--registry") == ("127.0.0.1:1", "127.0.0.1:2")
    assert addresses_of("unix:/x, a:1,a:1", flag="--registry") == ("unix:/x", "a:1")
    for text in ("", "a", ":1", "a:1,,b:2"):
        with pytest.raises(AddressInvalid, match="--registry"):
            addresses_of(text, flag="--registry")


# -- loops -------------------------------------------------------------------------------------------------------------


async def test_a_loop_that_fails_goes_on(log_stream):
    runs = asyncio.Semaphore(0)

    async def loop():
        runs.release()
        raise OSError(24, "Too many open files")

    going = asyncio.create_task(going_on(loop, name="reports", pause_s=0.01))
    for _ in range(3):
        await runs.acquire()
    going.cancel()

    assert "reports failed and goes on" in log_stream.getvalue()
