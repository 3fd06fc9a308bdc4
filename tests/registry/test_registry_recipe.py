"""One recipe for every connection: schemes, options, schemas, encodings, and no password anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import psycopg
import pytest

from fix_postgres import running_registry, url_of
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.postgres.server.connect import DatabaseUnreachable, migrate_when_reachable
from headrace_registry.postgres.server.migrations import DatabaseUnsuitable, migrate, packaged_migrations
from headrace_registry.postgres.server.pool import Database
from headrace_registry.postgres.server.recipe import ConnectionRecipe, DatabaseUrlInvalid

SECRET = "s3cr3t"
TABLE_OF = "SELECT schemaname FROM pg_tables WHERE tablename = %s ORDER BY 1"


def schemas_of(url: str, table: str) -> list[str]:
    with psycopg.connect(url) as conn:
        return [schema for (schema,) in conn.execute(TABLE_OF, (table,)).fetchall()]


async def lists_models(url, folder):
    """Serves with that URL and lists models over a real connection."""
    async with running_registry(url, folder) as registry:
        answer = await registry.stubs.models.ListModels(pb.ListModelsRequest(), timeout=20)
    return list(answer.models)


@pytest.mark.parametrize(
    "scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2", "POSTGRESQL"]
)
def test_a_driver_in_the_scheme_is_left_out(scheme):
    recipe = ConnectionRecipe.of(f"{scheme}://me:{SECRET}@db.example:5433/models?sslmode=require")

    assert recipe.parameters == {
        "user": "me",
        "password": SECRET,
        "host": "db.example",
        "port": "5433",
        "dbname": "models",
        "sslmode": "require",
    }


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://me:{SECRET}@host/db",
        f"me:{SECRET}@host/db",
        f"postgresql://me:{SECRET}%zz@host/db",
        f"postgresql://me:{SECRET}@host/db?sslmode",
        f"postgresql://me:{SECRET}@host/db?ssl={SECRET}",
        f"host=h password='{SECRET}",
    ],
)
def test_a_url_that_can_not_be_read_is_refused_without_its_password(url):
    with pytest.raises(DatabaseUrlInvalid, match="DATABASE_URL") as refused:
        ConnectionRecipe.of(url)

    chain = f"{refused.value} {refused.value.__cause__!r} {ConnectionRecipe.of('host=a')!r}"
    assert SECRET not in chain


def test_a_dead_connection_ends_in_seconds_however_long_its_statements_may_take():
    recipe = ConnectionRecipe.of("postgresql://localhost/d")

    assert recipe.arguments(timeout_s=3600)["tcp_user_timeout"] == 25_000
    assert recipe.arguments(timeout_s=5)["tcp_user_timeout"] == 5000


def test_a_parameter_that_libpq_does_not_know_is_named():
    with pytest.raises(DatabaseUrlInvalid, match=r"'ssl'.*sslmode"):
        ConnectionRecipe.of("postgresql://host/db?ssl=require")


async def test_no_password_is_in_an_error_or_a_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    url = f"postgresql+psycopg://me:{SECRET}@/{SECRET}?host={tmp_path}"
    with pytest.raises(DatabaseUnreachable) as refused:
        await migrate_when_reachable(url, patience_s=0.2)
    database = Database(url, deadline_s=0.5)
    await database.open()
    assert not await database.answers(deadline_s=0.5)
    await database.close()

    assert SECRET not in str(refused.value)
    assert SECRET not in repr(ConnectionRecipe.of(url))
    assert SECRET not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("headrace"))


async def test_a_new_database_gets_a_schema_of_its_own(bare_database_url, tmp_path):
    with psycopg.connect(bare_database_url, autocommit=True) as conn:
        conn.execute("CREATE TABLE models (theirs int)")
        conn.execute("CREATE TABLE schema_migrations (version bigint PRIMARY KEY, dirty boolean)")
        conn.execute("INSERT INTO schema_migrations VALUES (20240101, false)")

    assert await lists_models(bare_database_url, tmp_path / "data") == []
    assert schemas_of(bare_database_url, "models") == ["headrace", "public"]
    with psycopg.connect(bare_database_url) as conn:
        assert conn.execute("SELECT * FROM schema_migrations").fetchall() == [(20240101, False)]


async def test_a_keyword_string_with_a_folder_of_sockets_is_a_url_too(bare_database_url, tmp_path):
    parameters = psycopg.conninfo.conninfo_to_dict(bare_database_url)

    assert str(parameters["host"]).startswith("/")
    assert await lists_models(psycopg.conninfo.make_conninfo(**parameters), tmp_path / "data") == []
    assert schemas_of(bare_database_url, "models") == ["headrace"]


async def test_the_search_path_of_the_url_holds_for_every_connection(bare_database_url, tmp_path):
    url = f"{bare_database_url}&options=-csearch_path%3Dteam_a"

    assert await lists_models(url, tmp_path / "one") == []
    assert await lists_models(url, tmp_path / "two") == []
    assert schemas_of(bare_database_url, "models") == ["team_a"]


async def test_two_installations_share_a_database_by_their_search_paths(bare_database_url):
    await migrate(bare_database_url, packaged_migrations())
    other = f"{bare_database_url}&options=-csearch_path%3Dteam_b"
    assert await migrate(other, packaged_migrations()) != ()

    async def schema_of(url):
        database = Database(url)
        await database.open()
        row = await (await database.single(lambda conn: conn.execute("SELECT current_schema() AS s"))).fetchone()
        await database.close()
        return row["s"]

    assert await asyncio.gather(schema_of(bare_database_url), schema_of(other)) == ["headrace", "team_b"]


async def test_tables_of_an_earlier_version_stay_where_they_are(bare_database_url, tmp_path):
    with psycopg.connect(bare_database_url, autocommit=True) as conn:
        conn.execute(
            "CREATE TABLE schema_migrations (version integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, "
            "apply_time timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        for migration in packaged_migrations():
            if migration.version < 16:
                conn.execute(migration.sql)
                conn.execute(
                    "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
                    (migration.version, migration.name, migration.checksum),
                )
        conn.execute("INSERT INTO models (id, identity, source_kind, location) VALUES ('old', 'i', 'hub', 'a/b')")

    assert [model.id for model in await lists_models(bare_database_url, tmp_path / "data")] == ["old"]
    assert schemas_of(bare_database_url, "models") == ["public"]
    assert schemas_of(bare_database_url, "schema_migrations") == []
    assert schemas_of(bare_database_url, "headrace_migrations") == ["public"]


async def test_a_role_that_may_not_make_the_schema_is_told_the_statement(postgres, bare_database_url):
    name = bare_database_url.rsplit("/", 1)[1].split("?")[0]
    with psycopg.connect(postgres.url, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE guest_{name} LOGIN")
    try:
        url = url_of(postgres, name).replace("postgres@", f"guest_{name}@")
        with pytest.raises(DatabaseUnsuitable, match="CREATE SCHEMA headrace AUTHORIZATION"):
            await migrate_when_reachable(url)
    finally:
        with psycopg.connect(postgres.url, autocommit=True) as conn:
            conn.execute(f"DROP ROLE guest_{name}")


async def test_a_database_of_another_encoding_is_refused_by_name(postgres):
    with psycopg.connect(postgres.url, autocommit=True) as conn:
        conn.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(DatabaseUnsuitable, match=r"LATIN1.*UTF8"):
            await migrate_when_reachable(url_of(postgres, "latin"))
    finally:
        with psycopg.connect(postgres.url, autocommit=True) as conn:
            conn.execute("DROP DATABASE latin WITH (FORCE)")


async def test_every_connection_speaks_utf8_and_utc_and_has_limits(database_url, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    async with contextlib.AsyncExitStack() as stack:
        conn = await stack.enter_async_context(await ConnectionRecipe.of(database_url).connect(timeout_s=7.0))
        names = ("client_encoding", "timezone", "statement_timeout", "idle_in_transaction_session_timeout")
        found = [(await (await conn.execute(f"SHOW {name}")).fetchone()).popitem()[1] for name in names]

    assert found == ["UTF8", "UTC", "7s", "14s"]
