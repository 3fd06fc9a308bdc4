"""Numbered SQL files in `postgres/migrations`, forward only, each one transaction, under one advisory lock.

Numbers only grow. A number is never given to another file, and gaps stay: databases record each number with the
checksum of its file. No version ever had a 0005.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from psycopg import errors, sql

from headrace_chassis.errors import StartError
from headrace_registry.postgres.server.recipe import MIGRATIONS_TABLE, SCHEMA, Connection, ConnectionRecipe

log = logging.getLogger(__name__)

# "headrace" in ASCII, which no other program on the same database locks. Replicas that start together queue behind it.
_LOCK = 0x68_65_61_64_72_61_63_65
_LOCK_TIMEOUT_S = 60
# An index on a large table takes its time; a connection that is dead ends sooner, by its keepalives.
_STATEMENT_TIMEOUT_S = 3600.0
_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
# The table's name in earlier versions, which other programs use as well.
_EARLIER_TABLE = "schema_migrations"

_CREATE = """
CREATE TABLE headrace_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    apply_time timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
_READ = "SELECT version, checksum FROM headrace_migrations"
_RECORD = "INSERT INTO headrace_migrations (version, name, checksum) VALUES (%s, %s, %s)"
# Where an operator set the search path, by the URL, for the role or for the database, its first schema is chosen.
_PLACE = """
SELECT current_setting('server_encoding') AS encoding, to_regclass(%(table)s) IS NOT NULL AS present,
       CASE WHEN s.source = 'default' THEN ''
            WHEN first.name = '$user' THEN current_schema() ELSE first.name END AS chosen
FROM pg_settings s,
     LATERAL (SELECT btrim(split_part(s.setting, ',', 1), ' "') AS name) first
WHERE s.name = 'search_path'
"""
_SCHEMA_EXISTS = "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = %(schema)s) AS present"
# Columns of the earlier table; another program's has others, or other contents.
_EARLIER_COLUMNS = """
SELECT count(*) AS n FROM pg_attribute
WHERE attrelid = to_regclass(%(table)s) AND attname IN ('version', 'name', 'checksum', 'apply_time') AND attnum > 0
"""
_EARLIER_READ = "SELECT checksum FROM schema_migrations WHERE version = 1"
_EARLIER_RENAME = "ALTER TABLE schema_migrations RENAME TO headrace_migrations"


class SchemaMismatch(StartError):
    """This version can't work on the database's schema."""


class DatabaseUnsuitable(StartError):
    """The database can't hold Headrace's tables as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One SQL file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def packaged_migrations() -> tuple[Migration, ...]:
    """Returns the migrations of this version in order."""
    found = []
    for entry in files("headrace_registry.postgres").joinpath("migrations").iterdir():
        matched = _NAME.fullmatch(entry.name)
        if matched is not None:
            text = entry.read_text(encoding="utf-8")
            found.append(Migration(version=int(matched[1]), name=matched[2], sql=text))
    found.sort(key=lambda migration: migration.version)
    assert len({migration.version for migration in found}) == len(found)
    return tuple(found)


async def migrate(url: str, migrations: Sequence[Migration]) -> tuple[int, ...]:
    """Applies missing migrations and returns their versions. Raises StartError, or psycopg errors."""
    recipe = ConnectionRecipe.of(url)
    async with await recipe.connect(timeout_s=_STATEMENT_TIMEOUT_S) as conn:
        free = await (await conn.execute("SELECT pg_try_advisory_lock(%s) AS taken", (_LOCK,))).fetchone()
        if free is None or not free["taken"]:
            log.info("another registry migrates the database; this one starts after it")
            await conn.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        try:
            # For locks of tables alone: a migration of another replica may take as long as a statement.
            await conn.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'")
            # Again under the lock: another replica may have made the schema while this one waited.
            await recipe.prepare(conn, timeout_s=_STATEMENT_TIMEOUT_S)
            await _make_place(conn, migrations)
            return await _apply(conn, migrations)
        finally:
            if not conn.closed:
                await conn.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))


async def _make_place(conn: Connection, migrations: Sequence[Migration]) -> None:
    """Makes schema and table of the migrations, unless the search path leads to them or to an earlier version's."""
    row = await (await conn.execute(_PLACE, {"table": MIGRATIONS_TABLE})).fetchone()
    assert row is not None
    if row["encoding"] != "UTF8":
        raise DatabaseUnsuitable(
            f"The database's encoding is {row['encoding']}, which can't hold every name; make one with "
            "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and name it in DATABASE_URL."
        )
    if row["present"] or await _took_over(conn, migrations):
        return
    schema = row["chosen"] or SCHEMA
    found = await (await conn.execute(_SCHEMA_EXISTS, {"schema": schema})).fetchone()
    if found is None or not found["present"]:
        try:
            await conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        except errors.InsufficientPrivilege as exc:
            raise DatabaseUnsuitable(
                f"The role of DATABASE_URL may not create the schema {schema!r} for Headrace's tables; have it made "
                f"by CREATE SCHEMA {schema} AUTHORIZATION …, or name another by ?options=-csearch_path%3DNAME."
            ) from exc
    if not row["chosen"]:
        await conn.execute("SELECT set_config('search_path', %s, false)", (SCHEMA,))
    await conn.execute(_CREATE)


async def _took_over(conn: Connection, migrations: Sequence[Migration]) -> bool:
    """Renames the table of an earlier version of Headrace, which is known by the checksum of its first migration."""
    columns = await (await conn.execute(_EARLIER_COLUMNS, {"table": _EARLIER_TABLE})).fetchone()
    if columns is None or columns["n"] < 4:
        return False
    row = await (await conn.execute(_EARLIER_READ)).fetchone()
    ours = {migration.checksum for migration in migrations if migration.version == 1}
    if row is None or row["checksum"] not in ours:
        return False
    await conn.execute(_EARLIER_RENAME)
    return True


async def _apply(conn: Connection, migrations: Sequence[Migration]) -> tuple[int, ...]:
    rows = await (await conn.execute(_READ)).fetchall()
    applied: dict[int, str] = {row["version"]: row["checksum"] for row in rows}
    _check_known(applied, migrations)
    missing = [migration for migration in migrations if migration.version not in applied]
    for migration in missing:
        async with conn.transaction():
            await conn.execute(migration.sql.encode())
            await conn.execute(_RECORD, (migration.version, migration.name, migration.checksum))
    return tuple(migration.version for migration in missing)


def _check_known(applied: dict[int, str], migrations: Sequence[Migration]) -> None:
    """Raises SchemaMismatch if a newer or different version made a change to the database."""
    known = {migration.version: migration for migration in migrations}
    for version, checksum in sorted(applied.items()):
        migration = known.get(version)
        if migration is None:
            raise SchemaMismatch(
                f"The database has migration {version}, which this version does not know; start the newer version."
            )
        if migration.checksum != checksum:
            raise SchemaMismatch(
                f"Migration {version} ({migration.name}) differs from the one applied; "
                "start the version that made this database, or give another one."
            )
