"""ResidencyService over gRPC, with nodes that speak NodeService."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from fix_postgres import refused
from fix_registry import (
    GIB,
    LLAMA,
    acquire,
    cpu,
    lease_request,
    new_request_id,
    ready_model,
    register_folder,
    residency_of,
    until,
    until_residency,
    write_model,
)
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as model_service
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb
from headrace_registry.models.files import architecture_from
from headrace_registry.sizing.reservation import estimated_bytes

MB = 1_000_000
TINY_BYTES = estimated_bytes({"F32": 256, "BF16": 80}, "float32", architecture=architecture_from(LLAMA))
ROOM_FOR_ONE = TINY_BYTES * 3 // 2
ROOM_FOR_TWO = TINY_BYTES * 5 // 2


async def residencies(stubs, **fields: object) -> list[r.Residency]:
    answer = await stubs.residencies.ListResidencies(pb.ListResidenciesRequest(**fields), timeout=20)
    return list(answer.residencies)


async def n_leases(stubs) -> int:
    return sum(each.n_leases for each in await residencies(stubs, include_ended=True))


async def test_a_lease_comes_by_way_of_a_load(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(measured_bytes=123 * MB)
    call = registry.stubs.residencies.AcquireLease(lease_request("tiny", holder="trainer", ttl_s=30), timeout=20)
    events = [event async for event in call]
    lease = events[-1].granted.lease
    residency = await residency_of(registry.stubs, lease.residency_id)

    assert events[0].WhichOneof("event") == "loading"
    assert any(event.loading.transfer.percent == 50.0 for event in events[:-1]) or len(events) == 2
    assert (lease.model_id, lease.node_id, lease.node_address, lease.ttl_s) == ("tiny", node.id, "127.0.0.1:7471", 30.0)
    assert residency.state == r.RESIDENCY_STATE_RESIDENT
    assert (residency.measured_bytes, residency.reserved_bytes, residency.n_leases) == (123 * MB, 123 * MB, 1)


async def test_the_estimate_is_reserved_until_the_size_is_measured(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node(slow_load=True)
    answer = await registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="tiny"))
    nodes = await registry.stubs.residencies.ListNodes(pb.ListNodesRequest())

    assert answer.residency.state == r.RESIDENCY_STATE_LOADING
    assert answer.residency.reserved_bytes == TINY_BYTES
    assert nodes.nodes[0].devices[0].reserved_bytes == TINY_BYTES


async def test_many_acquirers_share_one_load(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(slow_load=True)
    waiting = [asyncio.create_task(acquire(registry.stubs, "tiny", holder=f"h{n}")) for n in range(6)]
    await asyncio.sleep(0.3)
    node.load_gate.set()
    leases = await asyncio.gather(*waiting)

    assert node.loads == ["tiny"]
    assert len({lease.residency_id for lease in leases}) == 1
    assert sorted(lease.fence for lease in leases) == [1, 2, 3, 4, 5, 6]


async def test_cancelling_one_waiter_leaves_no_lease_and_does_not_disturb_the_other(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(slow_load=True)
    gone = registry.stubs.residencies.AcquireLease(lease_request("tiny", holder="gone"), timeout=20)
    await gone.read()
    stays = asyncio.create_task(acquire(registry.stubs, "tiny", holder="stays"))
    gone.cancel()
    await asyncio.sleep(0.2)
    node.load_gate.set()
    lease = await stays

    assert lease.holder == "stays"
    assert await n_leases(registry.stubs) == 1


async def test_a_model_that_is_not_ready_is_refused(registry, tmp_path):
    await asyncio.to_thread(write_model, tmp_path / "raw")
    await register_folder(registry.stubs, tmp_path / "raw", "raw")
    refusal = await refused(registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="raw")))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_READY")
    unknown = await refused(registry.stubs.residencies.AcquireLease(lease_request("unknown")))
    assert unknown.reason == "MODEL_NOT_FOUND"


async def test_without_a_node_the_caller_is_told_to_come_back(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    nobody = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny")))
    await start_node("node-a")
    unknown = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny", node_id="node-b")))
    device = await refused(
        registry.stubs.residencies.AcquireLease(lease_request("tiny", node_id="node-a", device_id="cuda:0"))
    )

    assert (nobody.code, nobody.reason, nobody.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "NODE_LOST", 2.0)
    assert (unknown.reason, device.reason) == ("NODE_NOT_FOUND", "NODE_NOT_FOUND")


async def test_only_resident_means_no_load(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node()
    refusal = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny", if_resident_only=True)))

    assert refusal.reason == "MODEL_NOT_READY"
    assert node.loads == []


async def test_a_model_larger_than_every_device_says_by_how_much(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node(devices=[cpu(100 * MB), cpu(150 * MB, "cpu1")])
    refusal = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny")))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_TOO_LARGE")
    assert refusal.metadata["required_bytes"] == str(TINY_BYTES)
    assert refusal.metadata["largest_bytes"] == str(150 * MB)


async def test_a_wait_behind_a_lease_ends_with_its_holders_named(registry, tmp_path, start_node):
    for name in ("one", "two"):
        await ready_model(registry.stubs, tmp_path, name)
    await start_node(devices=[cpu(ROOM_FOR_ONE)])
    await acquire(registry.stubs, "one", holder="alice")
    refusal = await refused(registry.stubs.residencies.AcquireLease(lease_request("two", wait_s=0.5), timeout=20))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "ADMISSION_TIMEOUT")
    assert (refusal.metadata["state"], refusal.metadata["position"]) == ("QUEUED", "1")
    assert refusal.metadata["holders"] == "alice (one)"
    assert refusal.retry_after_s is not None


async def test_a_queued_model_is_loaded_when_the_lease_in_its_way_is_released(registry, tmp_path, start_node):
    for name in ("one", "two"):
        await ready_model(registry.stubs, tmp_path, name)
    node = await start_node(devices=[cpu(ROOM_FOR_ONE)])
    lease = await acquire(registry.stubs, "one", holder="alice")
    waiting = asyncio.create_task(acquire(registry.stubs, "two"))
    await until(lambda: _is_queued(registry.stubs, "two"))
    loads_while_leased = list(node.loads)
    await registry.stubs.residencies.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence))

    assert (await waiting).model_id == "two"
    assert loads_while_leased == ["one"]


async def _is_queued(stubs, model_id: str) -> bool:
    return [each.state for each in await residencies(stubs, model_id=model_id)] == [r.RESIDENCY_STATE_QUEUED]


async def test_an_idle_model_is_evicted_and_its_memory_awaited(registry, tmp_path, start_node):
    for name in ("one", "two"):
        await ready_model(registry.stubs, tmp_path, name)
    node = await start_node(devices=[cpu(ROOM_FOR_ONE)], slow_unload=True)
    first = await acquire(registry.stubs, "one")
    await registry.stubs.residencies.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=first.id, fence=first.fence))
    call = registry.stubs.residencies.AcquireLease(lease_request("two", holder="bob"), timeout=20)
    queued = await call.read()
    victim = await until_residency(registry.stubs, first.residency_id, r.RESIDENCY_STATE_UNLOADING)
    await asyncio.sleep(0.3)
    assert node.loads == ["one"]  # Memory being unloaded still counts.
    node.unload_gate.set()
    last = await call.read()
    while last.WhichOneof("event") != "granted":
        last = await call.read()

    assert queued.queued.position == 1
    assert (victim.reason, victim.actor) == ("evicted for two", "bob")
    assert last.granted.lease.model_id == "two"
    ended = await residency_of(registry.stubs, first.residency_id)
    assert (ended.state, ended.actor) == (r.RESIDENCY_STATE_UNLOADED, "node node-a")


async def test_the_least_recently_used_goes_first(registry, tmp_path, start_node):
    for name in ("one", "two", "three"):
        await ready_model(registry.stubs, tmp_path, name)
    await start_node(devices=[cpu(ROOM_FOR_TWO)])
    for name in ("one", "two", "one"):
        lease = await acquire(registry.stubs, name)
        await registry.stubs.residencies.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence))
    await acquire(registry.stubs, "three")

    assert {each.model_id for each in await residencies(registry.stubs)} == {"one", "three"}


async def test_a_waiter_that_leaves_the_queue_leaves_nothing(registry, tmp_path, start_node):
    for name in ("one", "two"):
        await ready_model(registry.stubs, tmp_path, name)
    await start_node(devices=[cpu(ROOM_FOR_ONE)], slow_unload=True)
    lease = await acquire(registry.stubs, "one")
    await registry.stubs.residencies.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence))
    call = registry.stubs.residencies.AcquireLease(lease_request("two"), timeout=20)
    await call.read()
    queued = next(each for each in await residencies(registry.stubs, model_id="two"))
    call.cancel()
    ended = await until_residency(registry.stubs, queued.id, r.RESIDENCY_STATE_UNLOADED)

    assert ended.reason == "nobody waits any more"


async def test_waiting_ends_by_wait_s(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node(slow_load=True)
    loop = asyncio.get_running_loop()
    started = loop.time()
    refusal = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny", wait_s=1.0), timeout=20))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "ADMISSION_TIMEOUT")
    assert loop.time() - started < 4.0
    assert await n_leases(registry.stubs) == 0


@pytest.mark.parametrize(
    ("reason", "code", "expected"),
    [
        ("DEVICE_OOM", grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_OOM"),
        ("LOAD_FAILED", grpc.StatusCode.INTERNAL, "LOAD_FAILED"),
        ("RUNNER_LOST", grpc.StatusCode.UNAVAILABLE, "RUNNER_LOST"),
        ("whatever", grpc.StatusCode.INTERNAL, "LOAD_FAILED"),
    ],
)
async def test_a_failed_load_is_told_with_its_reason(registry, tmp_path, start_node, reason, code, expected):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(failure=model_pb2.Failure(reason=reason, message="no luck"))
    refusal = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny"), timeout=20))

    assert (refusal.code, refusal.reason) == (code, expected)
    assert "no luck" in refusal.message
    assert node.loads == ["tiny"]
    assert refusal.metadata["estimated_bytes"] == str(TINY_BYTES)
    nodes = await registry.stubs.residencies.ListNodes(pb.ListNodesRequest())
    assert nodes.nodes[0].devices[0].reserved_bytes == 0


async def test_a_failed_load_can_be_tried_again(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(failure=model_pb2.Failure(reason="LOAD_FAILED", message="no luck"))
    await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny"), timeout=20))
    node.failure = None
    at_once = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny"), timeout=20))
    loads_before = list(node.loads)
    await asyncio.sleep(at_once.retry_after_s)

    assert (at_once.code, at_once.reason) == (grpc.StatusCode.INTERNAL, "LOAD_FAILED")
    assert "no luck" in at_once.message
    assert 0 < at_once.retry_after_s <= 1.0
    assert loads_before == ["tiny"]
    assert (await acquire(registry.stubs, "tiny")).model_id == "tiny"


async def test_a_lease_expires_when_not_renewed_and_then_can_not_be_renewed(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    kept, lost = [await acquire(registry.stubs, "tiny", ttl_s=5) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(2.0)
        renewed = await registry.stubs.residencies.RenewLease(pb.RenewLeaseRequest(lease_id=kept.id, fence=kept.fence))
    refusal = await refused(
        registry.stubs.residencies.RenewLease(pb.RenewLeaseRequest(lease_id=lost.id, fence=lost.fence))
    )

    assert renewed.lease.expire_time.ToDatetime() > kept.expire_time.ToDatetime()
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST")
    assert await n_leases(registry.stubs) == 1


async def test_a_stale_fence_and_an_unknown_lease_are_refused_and_release_is_idempotent(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    lease = await acquire(registry.stubs, "tiny")
    stubs = registry.stubs.residencies
    stale = await refused(stubs.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence + 1)))
    unknown = await refused(stubs.RenewLease(pb.RenewLeaseRequest(lease_id="unknown", fence=1)))
    wrong = await refused(stubs.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence + 1)))
    for _ in range(2):
        await stubs.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence))
    await stubs.ReleaseLease(pb.ReleaseLeaseRequest(lease_id="unknown", fence=1))

    assert (stale.reason, unknown.reason, wrong.reason) == ("LEASE_LOST", "LEASE_NOT_FOUND", "LEASE_LOST")
    assert await n_leases(registry.stubs) == 0


async def test_acquiring_again_with_the_same_request_id_gives_the_same_lease(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    request_id = new_request_id()
    first, again = [await acquire(registry.stubs, "tiny", request_id=request_id) for _ in range(2)]
    release = pb.ReleaseLeaseRequest(lease_id=first.id, fence=first.fence)
    await registry.stubs.residencies.ReleaseLease(release)
    fresh = await acquire(registry.stubs, "tiny", request_id=request_id)

    assert first.id == again.id
    assert fresh.id != first.id
    assert await n_leases(registry.stubs) == 1


async def test_loading_again_with_the_same_request_id_gives_the_same_residency(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    request = pb.LoadModelRequest(request_id=new_request_id(), model_id="tiny")
    first, again = [(await registry.stubs.residencies.LoadModel(request)).residency for _ in range(2)]
    other = (await registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="tiny"))).residency

    assert first.id == again.id == other.id


async def test_unload_is_refused_while_leased_unless_forced(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node()
    lease = await acquire(registry.stubs, "tiny", holder="alice")
    stubs = registry.stubs.residencies
    refusal = await refused(stubs.UnloadModel(pb.UnloadModelRequest(model_id="tiny")))
    forced = await stubs.UnloadModel(pb.UnloadModelRequest(model_id="tiny", force=True))
    await until_residency(registry.stubs, lease.residency_id, r.RESIDENCY_STATE_UNLOADED)
    lost = await refused(stubs.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)))

    assert (refusal.reason, refusal.metadata["holders"]) == ("MODEL_IN_USE", "alice")
    assert [each.state for each in forced.residencies] == [r.RESIDENCY_STATE_UNLOADING]
    assert lost.reason == "LEASE_LOST"
    assert node.held == {}


async def test_a_resident_model_is_not_deleted(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    lease = await acquire(registry.stubs, "tiny", holder="alice")
    stubs = registry.stubs
    refusal = await refused(stubs.models.DeleteModel(model_service.DeleteModelRequest(model_id="tiny")))
    await stubs.residencies.UnloadModel(pb.UnloadModelRequest(model_id="tiny", force=True))
    await until_residency(stubs, lease.residency_id, r.RESIDENCY_STATE_UNLOADED)
    await stubs.models.DeleteModel(model_service.DeleteModelRequest(model_id="tiny"))

    assert (refusal.reason, refusal.metadata["holders"]) == ("MODEL_IN_USE", "alice")
    assert await residencies(stubs, include_ended=True) == []


async def test_the_measured_size_replaces_the_estimate_at_the_next_load(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node(measured_bytes=50 * MB, devices=[cpu(GIB)])
    lease = await acquire(registry.stubs, "tiny")
    await registry.stubs.residencies.UnloadModel(pb.UnloadModelRequest(model_id="tiny", force=True))
    await until_residency(registry.stubs, lease.residency_id, r.RESIDENCY_STATE_UNLOADED)
    again = (await registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="tiny"))).residency

    assert again.reserved_bytes == 50 * MB


async def test_residencies_are_listed_newest_first_in_pages(registry, tmp_path, start_node):
    for name in ("one", "two", "three"):
        await ready_model(registry.stubs, tmp_path, name)
    await start_node(devices=[cpu(4 * GIB)])
    for name in ("one", "two", "three"):
        await acquire(registry.stubs, name)
    stubs = registry.stubs.residencies
    first = await stubs.ListResidencies(pb.ListResidenciesRequest(page_size=2))
    rest = await stubs.ListResidencies(pb.ListResidenciesRequest(page_size=2, page_token=first.next_page_token))
    bad = await refused(stubs.ListResidencies(pb.ListResidenciesRequest(page_token="bm8")))

    assert [each.model_id for each in first.residencies] == ["three", "two"]
    assert ([each.model_id for each in rest.residencies], rest.next_page_token) == (["one"], "")
    assert bad.fields == ("page_token",)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"ttl_s": 1.0}, "ttl_s"),
        ({"wait_s": -1.0}, "wait_s"),
        ({"holder": "x" * 256}, "holder"),
        ({"request_id": "x"}, "request_id"),
        ({"device_id": "cpu"}, "device_id"),
        ({"node_id": "Bad Node"}, "node_id"),
    ],
)
async def test_bad_requests_name_their_field(registry, fields, field):
    refusal = await refused(registry.stubs.residencies.AcquireLease(lease_request("tiny", **fields)))

    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


async def test_concurrent_acquires_of_different_models_never_overcommit(registry, tmp_path, start_node):
    names = [f"m{n}" for n in range(5)]
    for name in names:
        await ready_model(registry.stubs, tmp_path, name)
    node = await start_node(devices=[cpu(ROOM_FOR_TWO)], slow_load=True)

    async def attempt(name: str) -> str:
        try:
            await acquire(registry.stubs, name, wait_s=2.0)
        except grpc.aio.AioRpcError as exc:
            return exc.code().name
        return "granted"

    attempts = [asyncio.create_task(attempt(name)) for name in names]
    await asyncio.sleep(0.5)
    reserved = (await registry.stubs.residencies.ListNodes(pb.ListNodesRequest())).nodes[0].devices[0].reserved_bytes
    node.load_gate.set()
    outcomes = await asyncio.gather(*attempts)

    assert reserved <= ROOM_FOR_TWO
    assert sorted(outcomes) == ["DEADLINE_EXCEEDED"] * 3 + ["granted"] * 2
