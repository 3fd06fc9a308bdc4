"""Numbered SQL files in `postgres/migrations`, forward only, each one transaction, under one advisory lock.

Numbers only grow. A number is never given to another file, and gaps stay: databases record each number with the
checksum of its file. No version ever had a 0005.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import psycopg
from psycopg.rows import tuple_row

from headrace_chassis.errors import StartError

# "headrace" in ASCII, which no other program on the same database locks. Replicas that start together queue behind it.
_LOCK = 0x68_65_61_64_72_61_63_65
_LOCK_TIMEOUT_S = 60
_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")

_CREATE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    apply_time timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
_READ = "SELECT version, checksum FROM schema_migrations"
_RECORD = "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)"


class SchemaMismatch(StartError):
    """This version can't work on the database's schema."""


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
    """Applies missing migrations and returns their versions. Raises SchemaMismatch, or psycopg errors."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=5) as conn:
        await conn.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'")
        await conn.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        try:
            return await _apply(conn, migrations)
        finally:
            await conn.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))


async def _apply(conn: psycopg.AsyncConnection[tuple[object, ...]], migrations: Sequence[Migration]) -> tuple[int, ...]:
    await conn.execute(_CREATE)
    cursor = await conn.cursor(row_factory=tuple_row).execute(_READ)
    applied: dict[int, str] = dict(await cursor.fetchall())
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
