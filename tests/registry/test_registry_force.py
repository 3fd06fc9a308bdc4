"""UnloadModel and DeleteModel of a model in use: refused with the holders' names, or forced with a reason."""

from __future__ import annotations

import asyncio

import psycopg

from fix_postgres import refused
from fix_registry import (
    ROOM_FOR_ONE,
    acquire,
    cpu,
    lease_request,
    new_request_id,
    ready_model,
    residency_of,
    until_residency,
)
from headrace.registry.v1 import model_service_pb2 as models
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb
from headrace_registry.errors import ModelInUse
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.postgres.requests import Request
from headrace_registry.postgres.server.pool import Database
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.deletion import Deletions


def deletion(**fields: object) -> models.DeleteModelRequest:
    return models.DeleteModelRequest(**{"model_id": "tiny", **fields})


async def pin(stubs) -> None:
    await stubs.residencies.PinModel(pb.PinModelRequest(pin=r.Pin(model_id="tiny", owner="bert")), timeout=20)


async def test_a_forced_unload_ends_leases_as_lost_and_drains(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node(slow_unload=True)
    lease = await acquire(registry.stubs, "tiny", holder="anna")
    call = registry.stubs.residencies.WatchResidencies(pb.WatchResidenciesRequest(), timeout=20)
    await call.read()
    await registry.stubs.residencies.UnloadModel(pb.UnloadModelRequest(model_id="tiny", force=True), timeout=20)
    events = [await call.read(), await call.read()]
    call.cancel()
    renewal = pb.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
    lost = await refused(registry.stubs.residencies.RenewLease(renewal, timeout=20))

    assert [event.residency.state for event in events] == [r.RESIDENCY_STATE_DRAINING, r.RESIDENCY_STATE_UNLOADING]
    assert {event.residency.reason for event in events} == {"unload asked for"}
    assert (lost.reason, lost.metadata["state"]) == ("LEASE_LOST", "LOST")
    assert lost.metadata["end_reason"].startswith("unload asked for by UnloadModel from")
    assert "unload asked for" in lost.message


async def test_a_refusal_names_holders_and_pin_owners(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    await acquire(registry.stubs, "tiny", holder="anna")
    await pin(registry.stubs)
    unload = await refused(registry.stubs.residencies.UnloadModel(pb.UnloadModelRequest(model_id="tiny"), timeout=20))
    delete = await refused(registry.stubs.models.DeleteModel(deletion(), timeout=20))

    for refusal in (unload, delete):
        assert refusal.reason == "MODEL_IN_USE"
        assert (refusal.metadata["holders"], refusal.metadata["pin_owners"]) == ("anna", "bert")
        assert "leased by anna and pinned by bert" in refusal.message


async def test_a_pinned_model_that_is_not_resident_is_deleted_only_with_force(registry, tmp_path):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await pin(registry.stubs)
    refusal = await refused(registry.stubs.models.DeleteModel(deletion(), timeout=20))
    await registry.stubs.models.DeleteModel(deletion(force=True), timeout=20)

    assert (refusal.reason, refusal.metadata["pin_owners"]) == ("MODEL_IN_USE", "bert")
    assert (await registry.stubs.residencies.ListPins(pb.ListPinsRequest(), timeout=20)).pins == []


async def test_a_forced_delete_forgets_the_model_once_its_memory_is_back(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(slow_unload=True)
    lease = await acquire(registry.stubs, "tiny")
    request = deletion(force=True, request_id=new_request_id())
    deleting = asyncio.create_task(_await(registry.stubs.models.DeleteModel(request, timeout=20)))
    await until_residency(registry.stubs, lease.residency_id, r.RESIDENCY_STATE_UNLOADING)
    still = await registry.stubs.models.GetModel(models.GetModelRequest(model_id="tiny"), timeout=20)
    node.unload_gate.set()
    await deleting

    assert still.model.id == "tiny"
    assert node.held == {}
    await registry.stubs.models.DeleteModel(request, timeout=20)
    assert (await refused(registry.stubs.models.DeleteModel(deletion(), timeout=20))).reason == "MODEL_NOT_FOUND"


async def test_those_who_wait_for_a_deleted_model_are_told(registry, tmp_path, start_node):
    for model_id in ("tiny", "other"):
        await ready_model(registry.stubs, tmp_path, model_id)
    await start_node(devices=[cpu(ROOM_FOR_ONE)], slow_unload=True)
    await registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="other"), timeout=20)
    (other,) = (await registry.stubs.residencies.ListResidencies(pb.ListResidenciesRequest(), timeout=20)).residencies
    await until_residency(registry.stubs, other.id, r.RESIDENCY_STATE_RESIDENT)
    waiting = registry.stubs.residencies.AcquireLease(lease_request("tiny", wait_s=60), timeout=20)
    queued = await waiting.read()
    await registry.stubs.models.DeleteModel(deletion(force=True), timeout=20)

    assert queued.queued.position == 1
    assert (await refused(waiting.read())).reason == "MODEL_NOT_FOUND"


async def test_a_forced_delete_of_what_is_never_given_back_ends_with_a_reason(
    registry, database_url, tmp_path, start_node
):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node(slow_unload=True)
    lease = await acquire(registry.stubs, "tiny")
    database, wakeups = Database(database_url), Wakeups()
    await database.open()
    deletions = Deletions(models=ModelStore(database, wakeups), wakeups=wakeups, deadline_s=0)
    request = Request(request_id="", method="DeleteModel", arguments=())
    error: Exception | None = None
    try:
        await deletions.delete("tiny", force=True, etag="", actor="a test", request=request)
    except ModelInUse as exc:
        error = exc
    await database.close()

    assert error is not None
    assert error.metadata["places"] == "node-a/cpu"
    assert error.retry_after_s
    residency = await residency_of(registry.stubs, lease.residency_id)
    assert (residency.state, residency.reason) == (r.RESIDENCY_STATE_UNLOADING, "delete asked for")


async def test_only_current_etags_delete_with_force_too(registry, tmp_path, start_node):
    model = await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    lease = await acquire(registry.stubs, "tiny")
    refusal = await refused(registry.stubs.models.DeleteModel(deletion(force=True, etag="0"), timeout=20))

    assert refusal.reason == "ETAG_MISMATCH"
    assert (await residency_of(registry.stubs, lease.residency_id)).n_leases == 1
    await registry.stubs.models.DeleteModel(deletion(force=True, etag=model.etag), timeout=20)


async def test_residencies_say_who_holds_them_and_where_they_are_in_line(registry, database_url, tmp_path, start_node):
    for model_id in ("tiny", "other", "third"):
        await ready_model(registry.stubs, tmp_path, model_id)
    await start_node(devices=[cpu(ROOM_FOR_ONE)], slow_unload=True)
    held = await acquire(registry.stubs, "tiny", holder="anna")
    await pin(registry.stubs)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        for n, model_id in enumerate(("other", "third")):
            await conn.execute(
                """INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, load_dtype,
                   node_epoch, reason, actor, create_time)
                   VALUES (%s, %s, 'node-a', 'cpu', 'QUEUED', 1000000000, 'float32', 1, 'waits', 'a test',
                   registry_now() + make_interval(secs => %s))""",
                (f"queued-{n}", model_id, n),
            )
            await conn.execute(
                "INSERT INTO waiters (id, residency_id, expire_time) VALUES (%s, %s, registry_now() + interval '1 h')",
                (f"waiter-{n}", f"queued-{n}"),
            )
        answer = await registry.stubs.residencies.ListResidencies(pb.ListResidenciesRequest(), timeout=20)
    third, other, tiny = answer.residencies

    assert (tiny.id, tiny.n_leases, list(tiny.holders), tiny.pinned) == (held.residency_id, 1, ["anna"], True)
    assert [(each.model_id, each.queue_position) for each in (tiny, other, third)] == [
        ("tiny", 0),
        ("other", 1),
        ("third", 2),
    ]
    assert not other.pinned
    assert not other.holders


async def _await(call: object) -> object:
    return await call  # type: ignore[misc]


async def test_a_model_that_is_being_deleted_is_not_loaded_again(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    node = await start_node(slow_unload=True)
    lease = await acquire(registry.stubs, "tiny")
    deleting = asyncio.create_task(_await(registry.stubs.models.DeleteModel(deletion(force=True), timeout=20)))
    await until_residency(registry.stubs, lease.residency_id, r.RESIDENCY_STATE_UNLOADING)
    again = await refused(registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="tiny"), timeout=20))
    node.unload_gate.set()
    await deleting

    assert again.reason == "MODEL_NOT_READY"
    assert "being deleted" in again.message
