"""Files that models share: a preparation's base is not deleted while it builds on it."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from fix_hub import SHA
from fix_registry import until, write_model
from headrace_registry.models.builds import BuildKind, FilesDoomed
from headrace_registry.models.files import ReadProgress, inspect_folder
from headrace_registry.postgres.models.models import FOLDERS_DOOM_OF_MODEL, MODEL_DELETE, ModelStore
from headrace_registry.postgres.models.preparations import BASE_FIND, BASE_TAKE, PreparationStore
from headrace_registry.postgres.requests import Request
from headrace_registry.postgres.server.pool import Database
from headrace_registry.wakeups import Wakeups

BASE = f"/store/owner-{SHA[:12]}"
ME = "a worker"


class Store:
    """`owner` is READY, quantized from the files in `BASE`; `guest` is the same model unquantized, in preparation."""

    def __init__(self, database: Database, conn: psycopg.AsyncConnection, watch: psycopg.AsyncConnection) -> None:
        self.models = ModelStore(database, Wakeups())
        self.preparations = PreparationStore(database, Wakeups())
        self.conn, self._watch = conn, watch

    async def fill(self) -> None:
        insert = (
            "INSERT INTO models (id, identity, source_kind, location, commit_sha, quantization, state, files_path,"
            " base_path) VALUES (%s, %s, 'hub', 'owner/tiny', %s, %s, %s, %s, %s)"
        )
        await self._watch.execute(insert, ("owner", "o", SHA, "INT8", "READY", f"{BASE}-int8", BASE))
        await self._watch.execute(insert, ("guest", "g", SHA, "NONE", "REGISTERED", "", ""))
        await self._watch.execute("INSERT INTO store_folders (path, model_id) VALUES (%s, 'owner')", (BASE,))
        await self.prepare("guest")

    async def prepare(self, model_id: str) -> None:
        await self.preparations.start(model_id, worker=ME, request=request("PrepareModel"))

    async def take_base(self) -> str:
        return await self.preparations.take_base(await self.models.get("guest"), ME, commit_sha=SHA)

    async def delete(self, model_id: str) -> None:
        asked = request("DeleteModel")
        await self.models.delete(model_id, force=False, etag="", actor="a test", request=asked)

    async def doomed(self) -> bool:
        rows = await self._watch.execute("SELECT doom_time IS NOT NULL FROM store_folders WHERE path = %s", (BASE,))
        return (await rows.fetchone()) == (True,)

    async def until_stopped(self, task: asyncio.Task[object]) -> None:
        """Returns once the task is over or waits for a lock."""
        waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

        async def stopped() -> bool:
            return task.done() or await (await self._watch.execute(waiting)).fetchone() is not None

        await until(stopped)


def request(method: str) -> Request:
    return Request(request_id="", method=method, arguments=())


@pytest.fixture
async def store(database_url):
    database = Database(database_url)
    await database.open()
    async with (
        await psycopg.AsyncConnection.connect(database_url) as conn,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watch,
    ):
        made = Store(database, conn, watch)
        await made.fill()
        yield made
    await database.close()


async def test_files_that_are_being_deleted_are_no_base(store):
    await store.conn.execute(FOLDERS_DOOM_OF_MODEL, {"id": "owner"})
    await store.conn.execute(MODEL_DELETE, {"id": "owner"})
    taking = asyncio.create_task(store.take_base())
    await store.until_stopped(taking)
    await store.conn.commit()

    assert await taking == ""
    assert await store.doomed()


async def test_files_that_were_taken_as_a_base_a_moment_ago_are_not_deleted(store):
    model = {"model_id": "guest", "quantization": "NONE", "source_kind": "hub", "location": "owner/tiny"}
    found = await (await store.conn.execute(BASE_FIND, {**model, "commit_sha": SHA})).fetchone()
    await store.conn.execute(BASE_TAKE, {"model_id": "guest", "path": BASE})
    deleting = asyncio.create_task(store.delete("owner"))
    await store.until_stopped(deleting)
    await store.conn.commit()
    await deleting

    assert found == (BASE,)
    assert not await store.doomed()


async def test_files_somebody_else_is_preparing_are_not_deleted(store):
    await store.conn.execute("UPDATE models SET files_path = %s, state = 'READY' WHERE id = 'guest'", (BASE,))
    await store.conn.execute("DELETE FROM preparations")
    await store.conn.execute("UPDATE models SET files_path = '', state = 'REGISTERED' WHERE id = 'owner'")
    await store.conn.commit()
    await store.prepare("owner")
    await store.delete("guest")

    assert not await store.doomed()


async def test_a_model_is_not_ready_with_files_that_are_about_to_go(store, tmp_path):
    inspection = inspect_folder(await asyncio.to_thread(write_model, tmp_path / "m"), reading=ReadProgress())
    await store.conn.execute("UPDATE store_folders SET doom_time = registry_now()")
    await store.conn.commit()
    with pytest.raises(FilesDoomed):
        await store.preparations.finish("guest", ME, commit_sha=SHA, files_path=BASE, inspection=inspection)

    assert (await store.models.get("guest")).state.preparing
    assert await store.preparations.claim(ME, running=(), limit=1)


async def test_a_build_whose_result_is_about_to_go_is_done_again(store, tmp_path):
    inspection = inspect_folder(await asyncio.to_thread(write_model, tmp_path / "m"), reading=ReadProgress())
    await store.preparations.assign_build("guest", ME, kind=BuildKind.CONVERT_PICKLED, target_path=BASE)
    await store.conn.execute("UPDATE preparations SET done = true")
    await store.conn.execute("UPDATE store_folders SET doom_time = registry_now()")
    await store.conn.commit()
    with pytest.raises(FilesDoomed):
        await store.preparations.finish("guest", ME, commit_sha=SHA, files_path=BASE, inspection=inspection)

    assert not (await store.preparations.build_state("guest", ME)).done
