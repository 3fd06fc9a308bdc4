"""WatchResidencies: nothing twice, nothing out of order, and above all nothing missed."""

from __future__ import annotations

import asyncio

import grpc
import psycopg
import pytest

from fix_postgres import refused, running_registry
from fix_registry import FakeNode, cpu, ready_model, until, until_residency
from headrace.registry.v1 import model_service_pb2 as models
from headrace.registry.v1 import residency_pb2 as r
from headrace.registry.v1 import residency_service_pb2 as pb
from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.postgres.server.migrations import migrate, packaged_migrations
from headrace_registry.postgres.server.pool import Database
from headrace_registry.postgres.statements import RESIDENCY_EVENTS

STATE = r.ResidencyState


def watching(stubs, *, timeout: float = 20, **fields: object):
    return stubs.residencies.WatchResidencies(pb.WatchResidenciesRequest(**fields), timeout=timeout)


async def load(stubs, model_id: str = "tiny") -> r.Residency:
    answer = await stubs.residencies.LoadModel(pb.LoadModelRequest(model_id=model_id), timeout=20)
    return await until_residency(stubs, answer.residency.id, r.RESIDENCY_STATE_RESIDENT)


async def unload(stubs, model_id: str = "tiny") -> None:
    await stubs.residencies.UnloadModel(pb.UnloadModelRequest(model_id=model_id), timeout=20)


async def read_until(call, state: STATE.ValueType | None) -> list[pb.WatchResidenciesResponse]:
    events = [await call.read()]
    while events[-1].residency.state != state:
        events.append(await call.read())
    return events


@pytest.fixture
async def cluster(registry, tmp_path, start_node):
    """Two models and a node that loads and unloads at once."""
    for model_id in ("tiny", "other"):
        await ready_model(registry.stubs, tmp_path, model_id)
    return await start_node()


@pytest.fixture
async def store(database_url):
    database = Database(database_url)
    await database.open()
    yield EventStore(database, keep=10)
    await database.close()


async def test_a_residency_is_followed_from_its_request_to_its_end(registry, cluster):
    call = watching(registry.stubs)
    await load(registry.stubs)
    await unload(registry.stubs)
    events = await read_until(call, r.RESIDENCY_STATE_UNLOADED)
    call.cancel()

    states = [STATE.Name(event.residency.state).removeprefix("RESIDENCY_STATE_") for event in events]
    assert states == ["LOADING", "RESIDENT", "DRAINING", "UNLOADING", "UNLOADED"]
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert all(event.residency.reason and event.residency.actor for event in events)
    assert not any(event.snapshot for event in events)


async def test_a_watcher_begins_with_what_is_there(registry, cluster):
    resident = await load(registry.stubs)
    await load(registry.stubs, "other")
    call = watching(registry.stubs, model_id="tiny")
    first = await call.read()
    await unload(registry.stubs, "other")
    await unload(registry.stubs)
    rest = await read_until(call, r.RESIDENCY_STATE_UNLOADED)
    call.cancel()

    assert (first.snapshot, first.residency.id) == (True, resident.id)
    assert {event.residency.model_id for event in rest} == {"tiny"}
    assert min(event.seq for event in rest) > first.seq


async def test_a_watcher_cut_within_the_snapshot_is_sent_it_again(registry, cluster):
    for model_id in ("tiny", "other"):
        await load(registry.stubs, model_id)
    cut = watching(registry.stubs)
    first = await cut.read()
    cut.cancel()
    again = watching(registry.stubs, after_seq=first.seq)
    snapshot = [await again.read(), await again.read()]
    again.cancel()
    resumed = watching(registry.stubs, after_seq=snapshot[-1].seq)
    await unload(registry.stubs)
    next_one = next(event for event in await read_until(resumed, r.RESIDENCY_STATE_UNLOADED) if not event.heartbeat)
    resumed.cancel()

    assert [(event.snapshot, event.residency.model_id) for event in snapshot] == [(True, "tiny"), (True, "other")]
    assert (next_one.snapshot, next_one.seq) == (False, snapshot[-1].seq + 1)


async def test_a_resumed_watcher_gets_what_it_missed_and_nothing_again(registry, cluster):
    call = watching(registry.stubs)
    await load(registry.stubs)
    seen = await read_until(call, r.RESIDENCY_STATE_RESIDENT)
    call.cancel()
    await unload(registry.stubs)
    resumed = watching(registry.stubs, after_seq=seen[-1].seq)
    missed = await read_until(resumed, r.RESIDENCY_STATE_UNLOADED)
    resumed.cancel()

    assert [event.seq for event in missed] == list(range(seen[-1].seq + 1, seen[-1].seq + 1 + len(missed)))
    assert not any(event.snapshot for event in missed)


async def test_a_later_number_that_commits_first_hides_nothing(registry, cluster, database_url, store):
    first, second = await load(registry.stubs), await load(registry.stubs, "other")
    begun = await store.snapshot("")
    async with (
        await psycopg.AsyncConnection.connect(database_url) as early,
        await psycopg.AsyncConnection.connect(database_url) as late,
    ):
        await early.execute(RESIDENCY_EVENTS, {"ids": [first.id]})
        await late.execute(RESIDENCY_EVENTS, {"ids": [second.id]})
        await late.commit()
        before = await store.after(begun.seq, "")
        await early.commit()
        after = await store.after(before.seq, "")

    assert [event.residency.id for event in before.events] == [second.id]
    assert [event.residency.id for event in after.events] == [first.id]
    assert after.events[0].seq > before.events[0].seq


async def test_concurrent_readers_number_each_event_once(registry, cluster, database_url, store):
    resident = await load(registry.stubs)
    begun = await store.snapshot("")
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        for _ in range(5):
            await conn.execute(RESIDENCY_EVENTS, {"ids": [resident.id]})
    readings = await asyncio.gather(*(store.after(begun.seq, "") for _ in range(8)))

    numbers = [event.seq for event in max((each.events for each in readings), key=len)]
    assert numbers == [begun.seq + n for n in range(1, 6)]
    assert all([event.seq for event in each.events] == numbers for each in readings)


async def test_old_events_are_dropped_and_their_reader_starts_with_a_snapshot(registry, cluster, database_url, store):
    resident = await load(registry.stubs)
    begun = await store.snapshot("")
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        for _ in range(15):
            await conn.execute(RESIDENCY_EVENTS, {"ids": [resident.id]})
        await store.trim(100)
        kept = await (await conn.execute("SELECT count(*), min(seq) FROM residency_events")).fetchone()
    call = watching(registry.stubs, after_seq=begun.seq)
    first = await call.read()
    call.cancel()

    assert kept == (10, begun.seq + 6)
    assert await store.after(begun.seq, "") is None
    assert len((await store.after(begun.seq + 5, "")).events) == 10
    assert (first.snapshot, first.residency.id, first.seq) == (True, resident.id, begun.seq + 15)


async def test_a_seq_from_another_database_starts_with_a_snapshot(registry, cluster):
    await load(registry.stubs)
    call = watching(registry.stubs, after_seq=10**9)

    assert (await call.read()).snapshot
    call.cancel()


async def test_a_deleted_model_leaves_the_story_of_its_residencies(registry, cluster):
    await load(registry.stubs)
    begun = await watching(registry.stubs).read()
    deletion = {"model_id": "tiny", "force": True}
    await registry.stubs.models.DeleteModel(models.DeleteModelRequest(**deletion), timeout=20)
    call = watching(registry.stubs, after_seq=begun.seq)
    events = await read_until(call, r.RESIDENCY_STATE_UNLOADED)
    call.cancel()

    assert events[-1].residency.model_id == "tiny"


async def test_a_watch_ends_with_the_server_and_refuses_a_bad_seq(registry, cluster):
    refusal = await refused(watching(registry.stubs, after_seq=-1))
    await load(registry.stubs)
    call = watching(registry.stubs)
    await read_until(call, r.RESIDENCY_STATE_RESIDENT)  # The server has it.
    pending = asyncio.create_task(refused(read_until(call, None)))
    registry.shutdown.begin()
    ended = await pending

    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("after_seq",))
    assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


async def test_a_change_through_one_replica_wakes_the_waiters_of_the_other(database_url, tmp_path):
    """The poll interval is longer than the test may take: only a notification can end the waits."""
    one = running_registry(database_url, tmp_path / "one", roots=(tmp_path,), poll_s=600)
    two = running_registry(database_url, tmp_path / "two", roots=(tmp_path,), poll_s=600)
    async with one as first, two as second:
        await ready_model(first.stubs, tmp_path, "tiny")
        node = FakeNode(first.stubs, "node-a", [cpu()])
        node.load_gate.set()
        node.unload_gate.set()
        await node.start()
        call = watching(second.stubs)
        await load(second.stubs)
        events = await read_until(call, r.RESIDENCY_STATE_RESIDENT)
        await unload(second.stubs)
        events += await read_until(call, r.RESIDENCY_STATE_UNLOADED)
        call.cancel()
        await node.stop()

    assert node.loads == ["tiny"]
    assert len(events) >= 4


async def test_a_lost_listening_connection_is_opened_again(database_url, tmp_path):
    one = running_registry(database_url, tmp_path / "one", roots=(tmp_path,), poll_s=600)
    two = running_registry(database_url, tmp_path / "two", roots=(tmp_path,), poll_s=600)
    listeners = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
    async with (
        one as first,
        two as second,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn,
    ):

        async def n_listeners() -> bool:
            return await (await conn.execute(f"SELECT count(*) {listeners}")).fetchone() == (2,)

        await ready_model(first.stubs, tmp_path, "tiny")
        await until(n_listeners)
        await conn.execute(f"SELECT pg_terminate_backend(pid) {listeners}")
        await until(n_listeners)
        node = FakeNode(first.stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        call = watching(second.stubs)
        await load(second.stubs)
        await read_until(call, r.RESIDENCY_STATE_RESIDENT)
        call.cancel()
        await node.stop()


async def test_events_of_an_earlier_version_keep_their_numbers(empty_database_url):
    migrations = packaged_migrations()
    await migrate(empty_database_url, [each for each in migrations if each.version < 3])
    async with await psycopg.AsyncConnection.connect(empty_database_url, autocommit=True) as conn:
        for statement in (
            "INSERT INTO models (id, identity, source_kind, location) VALUES ('m', 'i', 'hub', 'a/b')",
            "INSERT INTO nodes (id, address, epoch, boot_nonce, state) VALUES ('n', 'a:1', 1, 'x', 'ALIVE')",
            "INSERT INTO devices (node_id, id, kind, capacity_bytes) VALUES ('n', 'cpu', 'CPU', 1)",
            """INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, load_dtype, node_epoch,
               reason, actor) VALUES ('r', 'm', 'n', 'cpu', 'RESIDENT', 1, 'float32', 1, 'x', 'x')""",
            """INSERT INTO residency_events (residency_id, model_id, state, reason, actor, residency)
               SELECT id, model_id, state, reason, actor, to_jsonb(r) FROM residencies r, generate_series(1, 3)""",
        ):
            await conn.execute(statement)
        await migrate(empty_database_url, migrations)
        await conn.execute(RESIDENCY_EVENTS, {"ids": ["r"]})
    database = Database(empty_database_url)
    await database.open()
    reading = await EventStore(database).after(1, "")
    await database.close()

    assert [(event.seq, event.residency.id) for event in reading.events] == [(2, "r"), (3, "r"), (4, "r")]
