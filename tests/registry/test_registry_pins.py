"""Pins over gRPC: how they are set, how they keep models, how they end."""

from __future__ import annotations

import asyncio
import datetime as dt

import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from fix_postgres import refused
from fix_registry import (
    ROOM_FOR_ONE,
    cpu,
    new_request_id,
    ready_model,
    register_folder,
    until,
    until_residency,
    write_model,
)
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb


def in_s(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds))
    return stamp


async def pin(stubs, model_id: str = "tiny", *, request_id: str = "", **fields: object) -> r.Pin:
    wanted = r.Pin(**{"model_id": model_id, "owner": "anna", **fields})
    answer = await stubs.residencies.PinModel(pb.PinModelRequest(request_id=request_id, pin=wanted), timeout=20)
    return answer.pin


async def unpin(stubs, owner: str = "anna", **fields: object) -> None:
    await stubs.residencies.UnpinModel(pb.UnpinModelRequest(model_id="tiny", owner=owner, **fields), timeout=20)


async def pins(stubs, **fields: object) -> list[r.Pin]:
    return list((await stubs.residencies.ListPins(pb.ListPinsRequest(**fields), timeout=20)).pins)


async def load(stubs, model_id: str = "tiny") -> r.Residency:
    answer = await stubs.residencies.LoadModel(pb.LoadModelRequest(model_id=model_id), timeout=20)
    return await until_residency(stubs, answer.residency.id, r.RESIDENCY_STATE_RESIDENT)


async def reasons(stubs, n: int, *, after_seq: int = 0) -> list[tuple[str, str]]:
    call = stubs.residencies.WatchResidencies(pb.WatchResidenciesRequest(after_seq=after_seq), timeout=20)
    return [(event.residency.reason, event.residency.actor) for event in [await call.read() for _ in range(n)]]


@pytest.fixture
async def tiny(registry, tmp_path):
    await asyncio.to_thread(write_model, tmp_path / "tiny")
    await register_folder(registry.stubs, tmp_path / "tiny", "tiny")


async def test_a_pin_is_answered_listed_changed_and_removed(registry, tiny, start_node):
    await start_node()
    end = in_s(3600)
    first = await pin(registry.stubs, reason="demo at noon", expire_time=end)
    await pin(registry.stubs, owner="bert", node_id="node-a")
    changed = await pin(registry.stubs, reason="demo at one")

    assert (first.owner, first.reason, first.expire_time) == ("anna", "demo at noon", end)
    assert (changed.reason, changed.HasField("expire_time"), changed.create_time) == (
        "demo at one",
        False,
        first.create_time,
    )
    assert [(each.owner, each.node_id) for each in await pins(registry.stubs)] == [("anna", ""), ("bert", "node-a")]
    await unpin(registry.stubs)
    await unpin(registry.stubs)
    assert [each.owner for each in await pins(registry.stubs)] == ["bert"]


async def test_pins_are_listed_in_pages_and_by_model(registry, tiny):
    for owner in ("c", "a", "b"):
        await pin(registry.stubs, owner=owner)
    first = await registry.stubs.residencies.ListPins(pb.ListPinsRequest(page_size=2), timeout=20)
    rest = pb.ListPinsRequest(page_size=2, page_token=first.next_page_token)
    second = await registry.stubs.residencies.ListPins(rest, timeout=20)

    assert [each.owner for each in [*first.pins, *second.pins]] == ["a", "b", "c"]
    assert not second.next_page_token
    assert await pins(registry.stubs, model_id="other") == []


async def test_the_same_request_id_pins_once(registry, tiny):
    request_id = new_request_id()
    await pin(registry.stubs, request_id=request_id, reason="once")
    await pin(registry.stubs, reason="changed since")
    again = await pin(registry.stubs, request_id=request_id, reason="once")

    assert again.reason == "changed since"
    refusal = await refused(pin(registry.stubs, request_id=request_id, reason="another"))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("request_id",))


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"owner": ""}, "FIELD_INVALID", "pin.owner"),
        ({"owner": "  "}, "FIELD_INVALID", "pin.owner"),
        ({"reason": "x" * 256}, "FIELD_INVALID", "pin.reason"),
        ({"model_id": "No Slug"}, "FIELD_INVALID", "pin.model_id"),
        ({"expire_time": in_s(-5)}, "FIELD_INVALID", "pin.expire_time"),
        ({"expire_time": Timestamp(seconds=2**60)}, "FIELD_INVALID", "pin.expire_time"),
        ({"node_id": "nowhere"}, "NODE_NOT_FOUND", ""),
        ({"model_id": "unknown"}, "MODEL_NOT_FOUND", ""),
    ],
)
async def test_a_bad_pin_is_refused_by_name(registry, tiny, fields, reason, field):
    refusal = await refused(pin(registry.stubs, **fields))

    assert (refusal.reason, refusal.fields) == (reason, (field,) if field else ())
    assert await pins(registry.stubs) == []


async def test_a_pinned_model_is_not_unloaded_without_force_and_its_owner_is_named(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    resident = await load(registry.stubs)
    await pin(registry.stubs, reason="evaluation runs")
    unload = pb.UnloadModelRequest(model_id="tiny")
    refusal = await refused(registry.stubs.residencies.UnloadModel(unload, timeout=20))

    assert (refusal.reason, refusal.metadata["pin_owners"]) == ("MODEL_IN_USE", "anna")
    assert "anna" in refusal.message
    forced = pb.UnloadModelRequest(model_id="tiny", force=True)
    await registry.stubs.residencies.UnloadModel(forced, timeout=20)
    await until_residency(registry.stubs, resident.id, r.RESIDENCY_STATE_UNLOADED)


async def test_a_pin_of_another_node_does_not_hold(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node("node-b", devices=[cpu(1)])
    await start_node()
    resident = await load(registry.stubs)
    await pin(registry.stubs, node_id="node-b")

    request = pb.UnloadModelRequest(model_id="tiny", node_id="node-a")
    await registry.stubs.residencies.UnloadModel(request, timeout=20)
    await until_residency(registry.stubs, resident.id, r.RESIDENCY_STATE_UNLOADED)


async def test_pinning_and_unpinning_are_events_of_what_they_touch(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    resident = await load(registry.stubs)
    call = registry.stubs.residencies.WatchResidencies(pb.WatchResidenciesRequest(), timeout=20)
    snapshot = await call.read()
    await pin(registry.stubs, reason="demo")
    pinned = await call.read()
    await unpin(registry.stubs)
    unpinned = await call.read()

    assert (snapshot.snapshot, snapshot.residency.id, snapshot.residency.pinned) == (True, resident.id, False)
    assert (pinned.residency.reason, pinned.residency.actor) == ("pinned by anna: demo", "anna")
    assert (pinned.residency.pinned, pinned.residency.state) == (True, r.RESIDENCY_STATE_RESIDENT)
    assert unpinned.residency.reason == "the pin of anna was removed"
    assert unpinned.residency.actor.startswith("UnpinModel from")
    assert not unpinned.residency.pinned
    call.cancel()


async def test_an_expired_pin_vanishes_and_says_so(registry, database_url, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await start_node()
    await load(registry.stubs)
    call = registry.stubs.residencies.WatchResidencies(pb.WatchResidenciesRequest(), timeout=20)
    await call.read()
    await pin(registry.stubs, expire_time=in_s(3600))
    await call.read()
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        await conn.execute("UPDATE pins SET expire_time = clock_timestamp() - interval '1 s'")

        assert await pins(registry.stubs) == []
        assert (await call.read()).residency.reason == "the pin of anna expired"
        assert await (await conn.execute("SELECT count(*) FROM pins")).fetchone() == (0,)
    await registry.stubs.residencies.UnloadModel(pb.UnloadModelRequest(model_id="tiny"), timeout=20)
    call.cancel()


async def test_a_pinned_model_is_never_evicted_and_a_waiter_is_served_once_it_is_unpinned(
    registry, tmp_path, start_node
):
    for model_id in ("tiny", "other"):
        await ready_model(registry.stubs, tmp_path, model_id)
    await start_node(devices=[cpu(ROOM_FOR_ONE)])
    resident = await load(registry.stubs)
    await pin(registry.stubs)
    refusal = await refused(registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="other"), timeout=20))

    assert refusal.reason == "CAPACITY_BUSY"
    assert (await until_residency(registry.stubs, resident.id, r.RESIDENCY_STATE_RESIDENT)).pinned
    await unpin(registry.stubs)

    async def served() -> bool:
        await registry.stubs.residencies.LoadModel(pb.LoadModelRequest(model_id="other"), timeout=20)
        found = await registry.stubs.residencies.ListResidencies(
            pb.ListResidenciesRequest(model_id="other"), timeout=20
        )
        return any(each.state == r.RESIDENCY_STATE_RESIDENT for each in found.residencies)

    await until(served)


async def test_a_pinned_model_is_loaded_when_its_node_starts(registry, tmp_path, start_node):
    first = await start_node()
    await ready_model(registry.stubs, tmp_path, "tiny")
    await ready_model(registry.stubs, tmp_path, "other")
    await pin(registry.stubs, node_id="node-a")
    await asyncio.sleep(0.2)
    assert first.loads == []
    await first.stop()

    again = await start_node()
    await until(lambda: again.loads == ["tiny"])
    [residency] = [each async for each in residents(registry.stubs)]
    await start_node("node-b")

    assert (residency.model_id, residency.node_id, residency.pinned) == ("tiny", "node-a", True)
    await asyncio.sleep(0.2)
    assert [each.node_id async for each in residents(registry.stubs)] == ["node-a"]


async def residents(stubs):
    for each in (await stubs.residencies.ListResidencies(pb.ListResidenciesRequest(), timeout=20)).residencies:
        yield each


async def test_a_pinned_model_that_has_no_room_does_not_keep_a_node_from_starting(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "tiny")
    await pin(registry.stubs)

    node = await start_node(devices=[cpu(1000)])

    assert node.epoch == 1
    assert node.loads == []
