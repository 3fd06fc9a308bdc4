"""Every kind of RPC through the interceptor of a real server."""

from __future__ import annotations

import asyncio
import json
import random

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from fix_chassis import MODEL_SERVICE, SERVICE, eventually
from headrace_chassis.status import reason_of


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    """Returns code and reason with which a call fails; consumes streams."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (consume(call) if hasattr(call, "__aiter__") else call)
    return outcome(caught.value)


async def consume(call) -> None:
    async for _ in call:
        pass


def outcome(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    status = rpc_status.from_call(error)
    return error.code(), reason_of(status) if status is not None else ""


NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_all_four_kinds_answer(probe_server):
    probe = await probe_server()

    assert (await probe.unary("hello")).value == "HELLO"
    assert [part async for part in probe.stream("Generate", "3")] == [b"0", b"1", b"2"]
    assert [part async for part in probe.stream("Write", "3")] == [b"0", b"1", b"2"]
    assert (await probe.upload(iter([StringValue(value="ab"), StringValue(value="c")]))).value == "3"
    assert [each.value async for each in probe.chat(iter([StringValue(value="a")]))] == ["A"]


async def test_all_four_kinds_map_errors(probe_server):
    probe = await probe_server()

    failing = [StringValue(value="missing")]

    assert await refusal(probe.unary("missing")) == NOT_FOUND
    assert await refusal(probe.stream("Generate", "2 missing")) == NOT_FOUND
    assert await refusal(probe.stream("Write", "2 missing")) == NOT_FOUND
    assert await refusal(probe.upload(iter(failing))) == NOT_FOUND
    assert await refusal(probe.chat(iter(failing))) == NOT_FOUND


async def test_messages_before_an_error_arrive(probe_server):
    probe = await probe_server()
    call = probe.stream("Generate", "2 missing")

    messages = aiter(call)
    assert [await anext(messages), await anext(messages)] == [b"0", b"1"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(messages)
    assert outcome(caught.value) == NOT_FOUND


async def test_every_detail_arrives_at_a_sync_client(probe_server):
    probe = await probe_server()

    def call() -> grpc.RpcError:
        with grpc.insecure_channel(probe.server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{SERVICE}/Unary")(StringValue(value="all").SerializeToString(), timeout=5)
        return caught.value

    status = rpc_status.from_call(await asyncio.to_thread(call))
    names = [each.type_url.rpartition(".")[2] for each in status.details]
    assert names == ["ErrorInfo", "RetryInfo", "BadRequest", "PreconditionFailure", "ResourceInfo"]


async def test_the_longest_error_arrives_whole(probe_server):
    probe = await probe_server()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await probe.unary("long")

    assert rpc_status.from_call(caught.value).message == caught.value.details()
    assert caught.value.details().endswith("Do this.")


@pytest.mark.parametrize(("error", "n_calls"), [("away", 1), ("shutting-down", 3)])
async def test_grpc_repeats_no_call_for_which_the_server_has_waited_already(probe_server, error, n_calls):
    probe = await probe_server()
    policy = {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    policy["retryableStatusCodes"] = ["UNAVAILABLE"]
    config = json.dumps({"methodConfig": [{"name": [{"service": SERVICE}], "retryPolicy": policy}]})

    async with grpc.aio.insecure_channel(probe.server.address, [("grpc.service_config", config)]) as channel:
        request = StringValue(value=error).SerializeToString()
        refused = await refusal(channel.unary_unary(f"/{SERVICE}/Unary")(request, timeout=5))

    assert refused[0] is grpc.StatusCode.UNAVAILABLE
    assert len(await probe.rpc_lines(n_calls)) == n_calls


async def test_internal_hides_the_message_and_carries_the_request_id(probe_server):
    probe = await probe_server()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await probe.unary("bug", metadata=(("x-request-id", "req-42"),))

    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (caught.value.code(), info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert info.metadata["request_id"] == "req-42"
    assert "password" not in f"{caught.value!r} {status}"
    (line,) = await probe.rpc_lines()
    assert "the password is 1234" in line["stack"]
    assert (line["level"], line["reason"], line["request_id"]) == ("error", "INTERNAL", "req-42")


async def test_one_json_line_per_rpc(probe_server):
    probe = await probe_server()

    await probe.unary("hello")
    await refusal(probe.unary("missing"))

    fine, failed = await probe.rpc_lines(2)
    assert fine["method"] == f"/{SERVICE}/Unary"
    assert (fine["code"], fine["reason"], fine["level"]) == ("OK", "", "info")
    assert (failed["code"], failed["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert 0 <= fine["duration_ms"] < 5000
    assert fine["peer"].startswith("ipv4:127.0.0.1:")
    assert fine["request_id"] != failed["request_id"]


async def test_request_id_is_taken_from_metadata_and_given_back(probe_server):
    probe = await probe_server()
    call = probe.unary("request id", metadata=(("x-request-id", "abc-1"),))

    assert (await call).value == "abc-1"
    assert ("x-request-id", "abc-1") in tuple(await call.trailing_metadata())
    inside = next(line for line in probe.lines() if line["message"] == "inside")
    assert inside["request_id"] == "abc-1"


async def test_unusable_request_id_is_replaced(probe_server):
    probe = await probe_server()

    made = (await probe.unary("request id", metadata=(("x-request-id", "a b" * 99),))).value

    assert len(made) == 32


async def test_unknown_method_has_a_reason(probe_server):
    probe = await probe_server()

    assert await refusal(probe.channel.unary_unary(f"/{SERVICE}/Nope")(b"")) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "NOT_IMPLEMENTED",
    )
    (line,) = await probe.rpc_lines()
    assert line["method"] == "unknown"
    assert probe.sample("headrace_rpcs_total", method="unknown", code="UNIMPLEMENTED") == 1


async def test_generated_method_nobody_wrote_has_a_reason(probe_server):
    probe = await probe_server()

    unary = probe.channel.unary_unary(f"/{MODEL_SERVICE}/GetModel")(b"")
    stream = probe.channel.unary_stream(f"/{MODEL_SERVICE}/WatchModel")(b"")

    assert await refusal(unary) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
    assert await refusal(stream) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")


async def test_request_that_is_no_protobuf_is_field_invalid(probe_server):
    probe = await probe_server()
    malformed = (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")

    assert await refusal(probe.channel.unary_unary(f"/{SERVICE}/Unary")(b"\xff\xff")) == malformed
    assert await refusal(probe.channel.stream_unary(f"/{SERVICE}/Upload")(iter([b"\xff\xff"]))) == malformed


async def test_oversized_message_has_a_reason(probe_server):
    probe = await probe_server(max_receive_bytes=1000)
    too_large = (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    big = StringValue(value="x" * 1200)

    assert await refusal(probe.unary(big.value)) == too_large
    assert await refusal(probe.stream("Generate", big.value)) == too_large
    assert await refusal(probe.upload(iter([StringValue(value="a"), big]))) == too_large
    assert (await probe.unary("still here")).value == "STILL HERE"


async def test_grossly_oversized_message_is_refused_by_grpc_itself(probe_server):
    probe = await probe_server(max_receive_bytes=1000)

    assert await refusal(probe.unary("x" * 5000)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "")


async def test_torn_upload_never_looks_complete(probe_server):
    probe = await probe_server(max_receive_bytes=1000)

    async def slow():
        yield StringValue(value="a")
        await asyncio.sleep(3600)

    def too_much():
        yield StringValue(value="a")
        yield StringValue(value="x" * 50_000)
        yield StringValue(value="b")

    for _ in range(8):
        call = probe.upload(slow())
        await asyncio.sleep(0.01)
        call.cancel()
        assert (await refusal(probe.upload(too_much())))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    await probe.rpc_lines(16)
    assert probe.probe.seen == []


async def test_streams_beyond_the_share_of_a_connection_are_refused(probe_server):
    probe = await probe_server(max_streams=4)
    first, second = probe.stream("Generate", "1 wait"), probe.stream("Write", "1 wait")
    await first.read()
    await second.read()

    assert await refusal(probe.stream("Generate", "1")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert (await probe.unary("unary goes on")).value
    first.cancel()
    await eventually(lambda: "generate closed" in probe.probe.seen)
    assert [part async for part in probe.stream("Generate", "1")] == [b"0"]
    second.cancel()


async def test_calls_beyond_the_limit_are_refused(probe_server):
    probe = await probe_server(max_concurrent_rpcs=2)
    slow = [asyncio.ensure_future(probe.unary("sleep 0.3")) for _ in range(2)]
    await asyncio.sleep(0.1)

    assert await refusal(probe.unary("x")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    await asyncio.gather(*slow)
    assert (await probe.unary("x")).value == "X"


async def test_client_that_disappears_ends_its_handler_and_the_gauge_goes_back(probe_server):
    probe = await probe_server()
    call = probe.stream("Generate", "1 wait")
    await call.read()
    assert probe.sample("headrace_streams_open", method=f"/{SERVICE}/Generate") == 1

    call.cancel()

    (line,) = await probe.rpc_lines()
    assert probe.probe.seen == ["generate opened", "generate closed"]
    assert probe.sample("headrace_streams_open", method=f"/{SERVICE}/Generate") == 0
    assert line["code"] == "CANCELLED"


async def test_client_deadline_is_logged_as_such(probe_server):
    probe = await probe_server()

    assert (await refusal(probe.unary("sleep 60", timeout=0.1)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    (line,) = await probe.rpc_lines()
    assert line["code"] in ("DEADLINE_EXCEEDED", "CANCELLED")


async def test_hundreds_of_abrupt_clients_leave_nothing_behind(probe_server):
    probe = await probe_server(max_streams=1000)
    chance = random.Random(7)

    async def abrupt() -> None:
        await asyncio.sleep(chance.random() * 0.2)
        kind = chance.randrange(4)
        call = [
            lambda: probe.stream("Generate", "300 missing"),
            lambda: probe.stream("Write", "300 wait"),
            lambda: probe.unary(chance.choice(["missing", "sleep 0.01", "bug", "x"])),
            lambda: probe.chat(StringValue(value="a") for _ in range(100)),
        ][kind]()
        await asyncio.sleep(chance.random() * 0.05)
        call.cancel()

    for _ in range(4):
        await asyncio.gather(*(abrupt() for _ in range(100)))
        another = grpc.aio.insecure_channel(probe.server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        torn = another.unary_stream(f"/{SERVICE}/Generate")(StringValue(value="100000 wait").SerializeToString())
        await torn.read()
        await another.close()

    await eventually(lambda: "generate closed" in probe.probe.seen)
    await asyncio.sleep(0.3)
    for method in ("Generate", "Write", "Chat"):
        assert probe.sample("headrace_streams_open", method=f"/{SERVICE}/{method}") == 0
    assert probe.probe.seen.count("generate opened") == probe.probe.seen.count("generate closed")
    assert [line for line in probe.lines() if line["logger"].startswith("grpc") and line["level"] != "info"] == []
    assert [line for line in probe.lines() if "never retrieved" in line["message"]] == []


async def test_streams_beyond_the_limit_of_the_server_are_refused(probe_server):
    probe = await probe_server(max_streams=4)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(probe.server.address, options=options) for _ in range(3)]
    request = StringValue(value="1 wait").SerializeToString()
    calls = [channel.unary_stream(f"/{SERVICE}/Generate")(request) for channel in channels[:2] for _ in range(2)]
    for call in calls:
        await call.read()

    refused = channels[2].unary_stream(f"/{SERVICE}/Generate")(request)
    assert await refusal(refused) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    for channel in channels:
        await channel.close()
