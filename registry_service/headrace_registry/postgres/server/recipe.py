"""How every connection to the database is made: migrations, pool and listener share one recipe.

The options of the URL are kept. Whatever Headrace needs besides is set by one statement on each new connection, since
poolers such as pgbouncer refuse options at the start of a session. Tables are in the schema that the search path names,
if an operator chose one, else in `headrace`, so that no table of another program matters; databases of earlier versions
keep theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_loads

from headrace_chassis.errors import StartError

Connection = psycopg.AsyncConnection[DictRow]

SCHEMA = "headrace"
MIGRATIONS_TABLE = "headrace_migrations"

_CONNECT_TIMEOUT_S = 5
# After so long without a sign of life, a connection is dead, however long its statement may take.
_DEAD_AFTER_S = 25.0
# SQLAlchemy names the driver in the scheme; libpq takes the scheme alone.
_SCHEME = re.compile(r"\A\s*(?:postgresql|postgres)(?:\+[a-z0-9_]+)?://", re.IGNORECASE)
_SECRETS = ("password", "sslpassword", "oauth_client_secret")

# `false`: for the session, not the transaction. A search path that an operator chose stays, and so does one by which
# the tables of an earlier version are found.
_PREPARE = """
SELECT set_config('statement_timeout', %(statement_ms)s, false),
       set_config('idle_in_transaction_session_timeout', %(idle_ms)s, false),
       set_config('timezone', 'UTC', false)
UNION ALL
SELECT set_config('search_path', %(schema)s, false), '', ''
WHERE to_regclass(%(table)s) IS NULL AND to_regclass(%(qualified)s) IS NOT NULL
  AND (SELECT source = 'default' FROM pg_settings WHERE name = 'search_path')
"""


class DatabaseUrlInvalid(StartError):
    """The database URL can't be read. The message never quotes it, since it may hold a password."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRecipe:
    """The parameters of a database URL, and the settings of each connection made with them."""

    parameters: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, url: str) -> ConnectionRecipe:
        """Reads a URL or a keyword string as libpq does, without a driver in its scheme. Raises DatabaseUrlInvalid."""
        plain = _SCHEME.sub("postgresql://", url)
        try:
            found = {name: str(value) for name, value in conninfo_to_dict(plain).items() if value is not None}
        except psycopg.Error:
            raise DatabaseUrlInvalid(_why_invalid(plain)) from None  # libpq's own message quotes the URL.
        return cls(parameters=found)

    def arguments(self, *, timeout_s: float) -> dict[str, Any]:
        """Returns the arguments of `psycopg.AsyncConnection.connect`, for statements that end after `timeout_s`."""
        defaults = {
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # Set apart from the statements' own: it overrides the keepalives, which end after the same 25 s.
            "tcp_user_timeout": int(min(timeout_s, _DEAD_AFTER_S) * 1000),
            "application_name": "headrace-registry",
            # A server that was demoted to a replica, or is read-only, is as good as away.
            "target_session_attrs": "read-write",
        }
        # No prepared statements: after a migration theirs would have other columns than the table, and poolers that
        # give each transaction another connection lose them.
        fixed = {"client_encoding": "utf8", "row_factory": dict_row, "prepare_threshold": None}
        return {**defaults, **self.parameters, **fixed}

    async def prepare(self, conn: Connection, *, timeout_s: float) -> None:
        """Sets limits, UTC and the search path on a new connection, in one statement."""
        before = conn.autocommit
        await conn.set_autocommit(True)
        values = {
            "statement_ms": str(int(timeout_s * 1000)),
            "idle_ms": str(int(timeout_s * 2000)),
            "table": MIGRATIONS_TABLE,
            "qualified": f"{SCHEMA}.{MIGRATIONS_TABLE}",
            "schema": SCHEMA,
        }
        await conn.execute(_PREPARE, values)
        await conn.set_autocommit(before)
        # JSON columns are half the cost of a page of models; the standard library's parser takes four times as long.
        set_json_loads(orjson.loads, conn)

    async def connect(self, *, timeout_s: float) -> Connection:
        """Opens one connection outside the pool, in autocommit mode."""
        conn: Connection = await psycopg.AsyncConnection.connect(autocommit=True, **self.arguments(timeout_s=timeout_s))
        try:
            await self.prepare(conn, timeout_s=timeout_s)
        except BaseException:
            await conn.close()
            raise
        return conn

    def without_secrets(self, text: str) -> str:
        """Returns the text, such as an error of libpq, with the secrets of the URL left out."""
        for name in _SECRETS:
            if secret := self.parameters.get(name):
                text = text.replace(secret, "***")
        return text


def _why_invalid(url: str) -> str:
    """Says in a sentence why libpq takes no such URL, without any part of it that may be secret."""
    form = "give postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with @ : / ? # % of the password percent-encoded"
    if not _SCHEME.match(url):
        return f"DATABASE_URL is no URL of Postgres; {form}."
    known = {each.keyword.decode() for each in Conninfo.get_defaults()}
    try:
        names = [name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)]
    except ValueError:
        names = []
    unknown = [name for name in names if name not in known and re.fullmatch(r"[a-z_]{1,40}", name)]
    if unknown:
        return f"DATABASE_URL has the parameter {unknown[0]!r}, which libpq does not know; leave it out (TLS: sslmode)."
    return f"DATABASE_URL can't be read; {form}."
