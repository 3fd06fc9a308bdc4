"""Migrations, the pool and the embedded server."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace

import psycopg
import pytest

from fix_postgres import FAST_SETTINGS
from headrace_registry.errors import DatabaseUnavailable, ModelNotFound
from headrace_registry.postgres.residency.unloading import RESIDENCIES_OF_MODEL_TO_END
from headrace_registry.postgres.server import migrations
from headrace_registry.postgres.server.connect import DatabaseUnreachable, migrate_when_reachable
from headrace_registry.postgres.server.embedded import EmbeddedFailed, EmbeddedPostgres
from headrace_registry.postgres.server.migrations import Migration, SchemaMismatch, migrate, packaged_migrations
from headrace_registry.postgres.server.pool import Database

MORE = Migration(version=2, name="more", sql="ALTER TABLE models ADD COLUMN extra integer NOT NULL DEFAULT 7")


async def test_migrations_apply_to_an_empty_database_once(empty_database_url):
    applied = await migrate(empty_database_url, packaged_migrations())

    assert applied == tuple(m.version for m in packaged_migrations())
    assert await migrate(empty_database_url, packaged_migrations()) == ()


async def test_a_later_migration_applies_to_a_populated_database(database_url):
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        await conn.execute("INSERT INTO models (id, identity, source_kind, location) VALUES ('m', 'i', 'hub', 'a/b')")
        later = replace(MORE, version=packaged_migrations()[-1].version + 1)

        assert await migrate(database_url, [*packaged_migrations(), later]) == (later.version,)
        assert await (await conn.execute("SELECT extra FROM models")).fetchone() == (7,)


async def test_replicas_that_start_together_migrate_once(empty_database_url):
    applied = await asyncio.gather(*(migrate(empty_database_url, packaged_migrations()) for _ in range(4)))

    assert sorted(len(versions) for versions in applied) == [0, 0, 0, len(packaged_migrations())]


async def test_a_replica_waits_for_anothers_migration_however_long_it_takes(database_url, monkeypatch, caplog):
    monkeypatch.setattr(migrations, "_LOCK_TIMEOUT_S", 0.1)
    caplog.set_level("INFO")
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute("SELECT pg_advisory_lock(%s)", (migrations._LOCK,))
        waiting = asyncio.create_task(migrate(database_url, packaged_migrations()))
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        await other.execute("SELECT pg_advisory_unlock(%s)", (migrations._LOCK,))

    assert not done
    assert await waiting == ()
    assert "another registry migrates" in caplog.text


async def test_the_residencies_of_a_model_are_found_by_an_index(database_url):
    places = {"model_id": "m", "node_id": ""}
    async with await psycopg.AsyncConnection.connect(database_url) as conn:
        await conn.execute("SET enable_seqscan = off")
        rows = await conn.execute(f"EXPLAIN {RESIDENCIES_OF_MODEL_TO_END}", places)
        plan = " ".join(line for (line,) in await rows.fetchall())

    assert "residencies_of_model" in plan


async def test_a_failing_migration_leaves_nothing(empty_database_url):
    broken = Migration(version=1, name="broken", sql="CREATE TABLE half (id int); SELECT nonsense")
    with pytest.raises(psycopg.Error):
        await migrate(empty_database_url, [broken])

    async with await psycopg.AsyncConnection.connect(empty_database_url) as conn:
        assert await (await conn.execute("SELECT to_regclass('half')")).fetchone() == (None,)


async def test_a_changed_or_unknown_migration_is_refused(database_url):
    first, *rest = packaged_migrations()
    with pytest.raises(SchemaMismatch, match="differs"):
        await migrate(database_url, [replace(first, sql=first.sql + "\n"), *rest])
    with pytest.raises(SchemaMismatch, match="newer version"):
        await migrate(database_url, [])


async def test_an_unreachable_database_is_named_at_start(tmp_path):
    url = f"postgresql://postgres@/postgres?host={tmp_path}"

    with pytest.raises(DatabaseUnreachable, match="DATABASE_URL"):
        await migrate_when_reachable(url, patience_s=0.2)


async def test_a_call_without_a_database_ends_typed_and_in_time(tmp_path):
    lost = []
    database = Database(
        f"postgresql://postgres@/postgres?host={tmp_path}", deadline_s=1.0, on_lost=lambda: lost.append(1)
    )
    await database.open()
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable) as caught:
        await database.run(lambda conn: conn.execute("SELECT 1"))

    assert time.monotonic() - started < 3.5
    assert caught.value.retry_after_s == 1.0
    await database.close()


async def test_a_statement_that_hangs_ends_in_time_and_the_pool_lives_on(database_url):
    database = Database(database_url, deadline_s=1.0)
    await database.open()
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await database.run(lambda conn: conn.execute("SELECT pg_sleep(30)"))
    assert time.monotonic() - started < 4.0

    assert await (await database.run(lambda conn: conn.execute("SELECT 1"))).fetchone() is not None
    await database.close()


async def test_a_cut_connection_is_replaced_within_the_call(database_url):
    database = Database(database_url)
    await database.open()
    await database.run(lambda conn: conn.execute("SELECT 1"))
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    await database.run(lambda conn: conn.execute("SELECT 1"))
    await database.close()


async def test_an_expected_error_rolls_back_and_is_not_retried(database_url):
    database = Database(database_url)
    await database.open()
    tries = []

    async def work(conn):
        tries.append(1)
        await conn.execute("INSERT INTO models (id, identity, source_kind, location) VALUES ('m', 'i', 'hub', 'a')")
        raise ModelNotFound("m")

    with pytest.raises(ModelNotFound):
        await database.run(work)
    cursor = await database.run(lambda conn: conn.execute("SELECT count(*) AS n FROM models"))
    assert (await cursor.fetchone())["n"] == 0
    assert tries == [1]
    await database.close()


def test_a_postmaster_killed_with_9_is_replaced_and_committed_rows_are_there(data_dir):
    server = EmbeddedPostgres(data_dir)
    server.own()
    server.start()
    with psycopg.connect(server.url, autocommit=True) as conn:
        conn.execute("CREATE TABLE kept AS SELECT 7 AS n")
    os.kill(int((server.pgdata / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    while server.running():
        time.sleep(0.01)
    server.start()

    with psycopg.connect(server.url) as conn:
        assert conn.execute("SELECT n FROM kept").fetchone() == (7,)
    server.stop()
    assert not server.running()
    assert (server.pgdata / "PG_VERSION").exists()


@pytest.mark.parametrize("gone", [True, False])
def test_a_server_that_can_not_be_stopped_holds_up_no_exit(data_dir, monkeypatch, caplog, gone):
    server = EmbeddedPostgres(data_dir, settings=FAST_SETTINGS)
    server.own()
    server.start()
    seen = server._postmaster()
    caplog.clear()

    def refuse(*args, **kwargs):
        if gone:
            seen.kill()
            seen.wait(10)
        raise EmbeddedFailed("pg_ctl failed: could not send stop signal")

    with monkeypatch.context() as patch:
        patch.setattr(server, "_execute", refuse)
        server.stop()

    assert [record.levelname for record in caplog.records] == ([] if gone else ["WARNING"])
    server.own()  # It had been given back.
    server.stop()


def test_a_server_is_stopped_though_its_folder_was_closed_to_others_meanwhile(data_dir):
    server = EmbeddedPostgres(data_dir, settings=FAST_SETTINGS)
    server.start()
    data_dir.chmod(0o700)
    server.stop()

    assert not server.running()


@pytest.mark.skipif(os.geteuid() != 0, reason="only for root Postgres runs as another user")
def test_folders_above_the_data_are_opened_to_the_user_of_postgres_alone(tmp_path):
    closed = tmp_path / "closed"
    (closed / "data").mkdir(parents=True)
    closed.chmod(0o700)
    server = EmbeddedPostgres(closed / "data")
    server.own()
    server.start()
    try:
        owner = server.pgdata.stat()
        assert (owner.st_uid, closed.stat().st_mode & 0o7) == (server._account.uid, 0)

        def may_pass(uid):
            script = f"import os; os.setgroups([]); os.setgid({uid}); os.setuid({uid}); os.stat({str(server.pgdata)!r})"
            return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == 0

        assert may_pass(owner.st_uid)
        assert not may_pass(12_345)
    finally:
        server.stop()


def test_a_running_server_is_attached_to_and_a_data_directory_has_one_owner(data_dir):
    first = EmbeddedPostgres(data_dir, settings=FAST_SETTINGS)
    first.own()
    first.start()
    pid_file = first.pgdata / "postmaster.pid"
    before = pid_file.read_text()
    with pytest.raises(EmbeddedFailed, match="--data-dir"):
        EmbeddedPostgres(data_dir).own()
    EmbeddedPostgres(data_dir).start()

    assert pid_file.read_text().split()[0] == before.split()[0]
    first.stop()


def test_a_data_directory_with_a_long_path_and_spaces_works_and_is_private(data_dir):
    folder = data_dir / ("long name " * 9).strip() / "data"
    server = EmbeddedPostgres(folder, settings=FAST_SETTINGS)
    server.start()

    assert server.socket_dir != server.pgdata
    assert stat.S_IMODE(server.socket_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.pgdata.stat().st_mode) == 0o700
    with psycopg.connect(server.url) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)
    server.stop()
    assert not server.socket_dir.exists()


def test_a_stale_pid_of_a_stranger_is_no_running_server(data_dir):
    server = EmbeddedPostgres(data_dir, settings=FAST_SETTINGS)
    server.start()
    server.stop()
    (server.pgdata / "postmaster.pid").write_text(f"{os.getpid()}\n{server.pgdata}\n1\n5432\n\n\n\nready\n")

    assert not server.running()
    server.start()
    assert server.running()
    server.stop()
