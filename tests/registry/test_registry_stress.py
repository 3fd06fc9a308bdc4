"""A real registry whose database changes, goes away or turns read-only, and whose callers and nodes ask too much."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fix_postgres import FAST_SETTINGS, RegistryStubs, refused, running_registry
from fix_registry import (
    ROOM_FOR_ONE,
    STATES,
    FakeNode,
    acquire,
    cpu,
    ready_model,
    register_folder,
    residency_of,
    until,
    until_state,
    write_model,
)
from headrace.registry.v1 import model_pb2, node_service_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2 as residency_service
from headrace_registry.errors import EtagMismatch
from headrace_registry.models.folders import ModelFolders
from headrace_registry.models.models import NewModel, Source, SourceKind
from headrace_registry.postgres.models.folders import FolderStore
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.postgres.requests import Request
from headrace_registry.postgres.server.embedded import EmbeddedPostgres
from headrace_registry.postgres.server.pool import Database
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers import preparation

READY = model_pb2.MODEL_STATE_READY


# -- a migration under running replicas --------------------------------------------------------------------------------


async def test_a_column_that_is_added_breaks_no_call_of_a_running_replica(registry, database_url, tmp_path):
    await ready_model(registry.stubs, tmp_path, "tiny")

    async def call_all(n_rounds):
        for _ in range(n_rounds):
            get = registry.stubs.models.GetModel(pb.GetModelRequest(model_id="tiny"), timeout=20)
            listed = registry.stubs.models.ListModels(pb.ListModelsRequest(), timeout=20)
            nodes = registry.stubs.residencies.ListNodes(residency_service.ListNodesRequest(), timeout=20)
            await asyncio.gather(get, listed, nodes)

    await call_all(20)
    preparing = asyncio.create_task(ready_model(registry.stubs, tmp_path, "other"))
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        for table in ("models", "nodes", "devices", "preparations", "residencies", "requests"):
            await conn.execute(f"ALTER TABLE {table} ADD COLUMN added integer NOT NULL DEFAULT 7")
            await call_all(5)

    assert (await preparing).state == READY
    assert not registry.task.done()


# -- a database that is away -------------------------------------------------------------------------------------------


async def test_calls_without_a_database_end_typed_and_health_follows(data_dir, tmp_path):
    server = EmbeddedPostgres(data_dir, settings=FAST_SETTINGS)
    await asyncio.to_thread(server.start)
    try:
        async with running_registry(server.url, tmp_path / "data", roots=(tmp_path,)) as registry:
            await ready_model(registry.stubs, tmp_path, "tiny")
            health = health_pb2_grpc.HealthStub(registry.stubs.channel)

            async def serving():
                states = [
                    (await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status
                    for name in ("", "headrace.registry.v1.ModelService")
                ]
                return states == [health_pb2.HealthCheckResponse.SERVING] * 2

            async def listed(timeout_s):
                started = time.monotonic()
                found = await refused(registry.stubs.models.ListModels(pb.ListModelsRequest(), timeout=timeout_s))
                return found.reason, found.retry_after_s, time.monotonic() - started

            assert await serving()
            # One right after the other, each to be over within its own deadline.
            await asyncio.to_thread(server.stop)
            outcomes = [await listed(timeout_s) for timeout_s in (2.0, 6.0, 6.0, 0.7)]
            await until(lambda: _equals(serving(), False))
            known_to_be_away = await listed(30.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registry.stubs.models.ListModels(pb.ListModelsRequest(), timeout=30)
            trailing = dict(caught.value.trailing_metadata())
            await asyncio.to_thread(server.start)
            await until(serving)
            model = await registry.stubs.models.GetModel(pb.GetModelRequest(model_id="tiny"), timeout=10)
            assert not registry.task.done()
    finally:
        await asyncio.to_thread(server.stop)

    assert [outcome[:2] for outcome in (*outcomes, known_to_be_away)] == [("DATABASE_UNAVAILABLE", 1.0)] * 5
    assert [took_s < 4.5 for *_, took_s in outcomes] == [True] * 4
    assert known_to_be_away[2] < 2.0
    assert trailing["grpc-retry-pushback-ms"] == "-1"  # A client's gRPC does not repeat the call.
    assert model.model.state == READY


async def test_a_database_that_turned_read_only_is_as_good_as_away(data_dir, tmp_path):
    server = EmbeddedPostgres(data_dir, settings=FAST_SETTINGS)
    await asyncio.to_thread(server.start)

    def set_read_only(value):
        with psycopg.connect(server.url, autocommit=True, options="-c default_transaction_read_only=off") as conn:
            conn.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            conn.execute("SELECT pg_reload_conf()")

    async def outcome(call):
        try:
            await call
        except grpc.aio.AioRpcError as exc:
            return (await refused(_raised(exc))).reason
        return "OK"

    try:
        async with running_registry(server.url, tmp_path / "data", roots=(tmp_path,)) as registry:
            await ready_model(registry.stubs, tmp_path, "tiny")
            update = pb.UpdateModelRequest(model=model_pb2.Model(id="tiny", labels={"a": "b"}))
            update.update_mask.paths.append("labels")
            await asyncio.to_thread(set_read_only, "on")
            seen = set()
            for _ in range(8):
                seen.add(await outcome(registry.stubs.models.UpdateModel(update, timeout=5)))
                seen.add(await outcome(registry.stubs.models.GetModel(pb.GetModelRequest(model_id="tiny"), timeout=5)))
            await asyncio.to_thread(set_read_only, "off")
            await until(lambda: _is_ok(registry.stubs.models.UpdateModel(update, timeout=5)))
            assert not registry.task.done()
    finally:
        await asyncio.to_thread(server.stop)

    assert seen <= {"OK", "DATABASE_UNAVAILABLE"}
    assert "DATABASE_UNAVAILABLE" in seen


async def _raised(exc):
    raise exc


async def _is_ok(call):
    try:
        await call
    except grpc.aio.AioRpcError:
        return False
    return True


# -- answers that are lost ---------------------------------------------------------------------------------------------


class LosesAnAnswer(Database):
    """Commits, then loses the connection before the answer is known, once for each `to_lose`."""

    to_lose = 0

    async def _once(self, work, *, autocommit):
        result = await super()._once(work, autocommit=autocommit)
        if self.to_lose:
            self.to_lose -= 1
            raise psycopg.OperationalError("the connection was lost while it committed")
        return result


async def test_a_change_whose_answer_was_lost_is_not_made_twice(database_url):
    database = LosesAnAnswer(database_url)
    await database.open()
    models = ModelStore(database, Wakeups())
    new = NewModel(id="m", source=Source(kind=SourceKind.FOLDER, location="/m"))
    model = await models.register(new, Request.of_call("", "RegisterModel"))
    database.to_lose = 1
    changed = await models.update(
        "m", labels={"a": "b"}, load_options=None, etag=model.etag, request=Request.of_call("", "UpdateModel")
    )
    with pytest.raises(EtagMismatch):
        await models.update(
            "m", labels={}, load_options=None, etag=model.etag, request=Request.of_call("", "UpdateModel")
        )
    database.to_lose = 1
    left = await models.delete("m", force=False, etag="", actor="test", request=Request.of_call("", "DeleteModel"))
    await database.close()

    assert (changed.labels, changed.revision) == ({"a": "b"}, model.revision + 1)
    assert left == ()


# -- preparations ------------------------------------------------------------------------------------------------------


async def test_builds_that_wait_for_a_node_keep_no_download_from_its_place(registry, tmp_path):
    for n in range(20):
        gguf = tmp_path / f"m{n}.gguf"
        gguf.write_bytes(b"GGUF" + bytes(100) + bytes([n]))
        source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
        model = model_pb2.Model(id=f"gguf-{n}", source=source)
        await registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)
        await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id=model.id), timeout=20)

    async def n_waiting():
        listed = await registry.stubs.models.ListModels(pb.ListModelsRequest(page_size=50), timeout=20)
        return sum(model.state == model_pb2.MODEL_STATE_CONVERTING for model in listed.models)

    await until(lambda: _equals(n_waiting(), 20))
    ready = await asyncio.wait_for(ready_model(registry.stubs, tmp_path, "folder"), 15)

    assert ready.state == READY


async def _equals(found, expected):
    return await found == expected


async def test_a_build_that_was_ended_from_outside_is_made_again(registry, start_node, tmp_path):
    node = await start_node()
    attempts = []

    async def build(message):
        attempts.append(message)
        if len(attempts) > 2:
            await asyncio.to_thread(write_model, tmp_path / "converted")
        failure = model_pb2.Failure(reason="RUNNER_LOST", message="ended by signal 9", interrupted=True)
        request = node_service_pb2.ReportBuildRequest(
            node_id=node.id,
            epoch=node.epoch,
            model_id=message.model.id,
            target_path=message.target_path,
            done=len(attempts) > 2,
            failure=None if len(attempts) > 2 else failure,
        )
        if len(attempts) > 2:
            await asyncio.to_thread((tmp_path / "converted").rename, message.target_path)
        await node.stubs.nodes.ReportBuild(request, timeout=20)
        node._tasks.pop(f"build {message.target_path}", None)

    node._build = build
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
    model = model_pb2.Model(id="m", source=source)
    await registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"), timeout=20)

    assert (await until_state(registry.stubs, "m", READY)).n_parameters == 336
    assert len(attempts) == 3


async def test_a_build_that_is_ended_from_outside_again_and_again_fails(registry, start_node, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_INTERRUPTED_PAUSE_S", 0.01)
    node = await start_node()

    async def build(message):
        failure = model_pb2.Failure(reason="RUNNER_LOST", message="ended by signal 9", interrupted=True)
        request = node_service_pb2.ReportBuildRequest(
            node_id=node.id,
            epoch=node.epoch,
            model_id=message.model.id,
            target_path=message.target_path,
            failure=failure,
        )
        await node.stubs.nodes.ReportBuild(request, timeout=20)
        node._tasks.pop(f"build {message.target_path}", None)

    node._build = build
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
    model = model_pb2.Model(id="m", source=source)
    await registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"), timeout=20)
    failed = await until_state(registry.stubs, "m", model_pb2.MODEL_STATE_FAILED)

    assert failed.failure.reason == "RUNNER_LOST"
    assert "ended from outside 6 times" in failed.failure.message


async def test_space_is_reserved_though_the_walk_of_the_store_takes_longer_than_a_transaction(
    database_url, tmp_path, monkeypatch
):
    def slowly(self):
        time.sleep(1.5)
        return {}

    monkeypatch.setattr(ModelFolders, "sizes", slowly)
    database = Database(database_url, deadline_s=1.0)
    await database.open()
    folders, wakeups = ModelFolders(tmp_path / "models"), Wakeups()
    models, preparations = ModelStore(database, wakeups), PreparationStore(database, wakeups)
    await models.register(
        NewModel(id="m", source=Source(kind=SourceKind.FOLDER, location="/m")), Request.of_call("", "RegisterModel")
    )
    await preparations.start("m", worker="w", request=Request.of_call("", "PrepareModel"))
    path = str(folders.root / "m-0123456789ab")
    store = FolderStore(database, wakeups, folders, quota_bytes=1000)
    lost = await store.evict_and_reserve("m", "w", path=path, total_bytes=10, make=True)
    await database.close()

    assert lost == []
    assert await asyncio.to_thread((folders.root / "m-0123456789ab").is_dir)


# -- watches -----------------------------------------------------------------------------------------------------------


async def test_a_watch_that_resumes_behind_the_events_of_a_new_model_sees_all_of_them(registry, tmp_path):
    folder = await asyncio.to_thread(write_model, tmp_path / "m")
    await register_folder(registry.stubs, folder, "m")
    call = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m", after_seq=50), timeout=20)
    event = await call.read()
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"), timeout=20)
    while event.model.state != READY:
        event = await call.read()

    assert event.seq < 50


async def test_a_watch_goes_on_with_a_model_that_was_deleted_and_registered_again(registry, database_url, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    call = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m"), timeout=20)
    first = await call.read()
    # In one transaction, so that the watch finds the second model in place of the first.
    async with await psycopg.AsyncConnection.connect(database_url) as conn:
        await conn.execute("UPDATE models SET event_seq = 1, labels = '{\"new\": \"1\"}' WHERE id = 'm'")
        await conn.execute("DELETE FROM model_events WHERE model_id = 'm'")
        await conn.commit()
    second = await call.read()
    call.cancel()

    assert first.seq > second.seq == 1
    assert second.snapshot
    assert second.model.labels == {"new": "1"}


# -- validations -------------------------------------------------------------------------------------------------------


async def test_bytes_of_a_cancelled_validation_count_until_its_node_has_freed_them(registry, start_node, tmp_path):
    await ready_model(registry.stubs, tmp_path, "a")
    await ready_model(registry.stubs, tmp_path, "b")
    node = await start_node(devices=[cpu(ROOM_FOR_ONE)])
    trial = registry.stubs.models.ValidateModel(pb.ValidateModelRequest(model_id="a"), timeout=30)
    reading = asyncio.create_task(trial.read())
    await until(lambda: any(message.validations for message in node.messages))
    attempt = next(each.validations[0] for each in node.messages if each.validations)
    trial.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: not node.messages[-1].validations)
    loaded = await registry.stubs.residencies.LoadModel(residency_service.LoadModelRequest(model_id="b"), timeout=20)
    await asyncio.sleep(2.5)  # Rounds of upkeep.
    while_held = await residency_of(registry.stubs, loaded.residency.id)
    delete_a = await refused(registry.stubs.models.DeleteModel(pb.DeleteModelRequest(model_id="a"), timeout=20))
    report = node_service_pb2.ReportValidationRequest(
        node_id=node.id, epoch=node.epoch, attempt_id=attempt.attempt_id, done=True
    )
    await registry.stubs.nodes.ReportValidation(report, timeout=20)
    lease = await acquire(registry.stubs, "b")
    await registry.stubs.models.DeleteModel(pb.DeleteModelRequest(model_id="a"), timeout=20)

    assert while_held.state == STATES.RESIDENCY_STATE_QUEUED
    assert (delete_a.reason, delete_a.metadata["places"]) == ("MODEL_IN_USE", "node-a/cpu (validation)")
    assert delete_a.message.endswith("; end its validation, or wait until the node has freed the memory")
    assert lease.residency_id == loaded.residency.id


# -- bounds ------------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_with_more_devices_than_a_node_may_have_is_refused(registry, start_node):
    node = await start_node()
    request = node_service_pb2.HeartbeatRequest(
        node_id=node.id, epoch=node.epoch, devices=[cpu(device_id=f"cuda:{n}") for n in range(65)]
    )
    found = await refused(registry.stubs.nodes.Heartbeat(request, timeout=20))

    assert (found.reason, found.fields) == ("FIELD_INVALID", ("devices",))


async def test_watches_of_a_client_keep_neither_nodes_nor_leases_nor_other_clients_away(database_url, tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        running = running_registry(database_url, tmp_path / "data", roots=(tmp_path,), max_streams=8)
        registry = await stack.enter_async_context(running)
        await ready_model(registry.stubs, tmp_path, "tiny")

        async def stubs():
            # A connection of its own: gRPC shares them between channels otherwise.
            options = [("grpc.use_local_subchannel_pool", 1)]
            return RegistryStubs(await stack.enter_async_context(grpc.aio.insecure_channel(registry.address, options)))

        async def watches(greedy):
            outcomes = []
            for _ in range(8):
                call = greedy.residencies.WatchResidencies(residency_service.WatchResidenciesRequest(), timeout=30)
                held.append(call)
                reading = asyncio.create_task(call.read())
                done, _ = await asyncio.wait({reading}, timeout=0.3)
                outcomes.append((await refused(reading)).reason if done else "open")
            return outcomes

        held = []
        first, second = await watches(await stubs()), await watches(await stubs())
        third = await watches(await stubs())
        node = FakeNode(await stubs(), "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        lease = await acquire(await stubs(), "tiny")
        await node.heartbeat()
        await node.stop()
        for call in held:
            call.cancel()

    assert first == second == ["open"] * 4 + ["TOO_MANY_STREAMS"] * 4
    assert third == ["TOO_MANY_STREAMS"] * 8
    assert lease.node_id == "node-a"
