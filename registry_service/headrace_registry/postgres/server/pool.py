"""Transactions over a pool: bounded waits, retries over lost connections, one typed error when Postgres is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import orjson
import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolClosed
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from headrace_registry.errors import DatabaseUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
Connection = psycopg.AsyncConnection[DictRow]

# Lost connections, a server that starts or stops, deadlocks and serialization failures. All are safe to run again: a
# transaction either committed or left nothing, and one that may have committed is idempotent or ends by its lease.
TRANSIENT = (psycopg.OperationalError, psycopg.InterfaceError, PoolClosed)

_CALL_DEADLINE_S = 10.0
# Cancelling a statement takes a second connection. A server that does not answer that either is not waited for.
_CANCEL_GRACE_S = 1.0
_CHECKOUT_TIMEOUT_S = 2.0
_MAX_CONNECTIONS = 10
_MAX_WAITING = 500
_RETRY_AFTER_S = 1.0
# A connection that answered this recently counts as alive; if it is dead after all, the transaction is run again.
_ALIVE_FOR_S = 0.5


class Database:
    """The connection pool of one process. `open` before use, `close` after."""

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = _CALL_DEADLINE_S,
        max_connections: int = _MAX_CONNECTIONS,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._deadline_s = deadline_s
        self._on_lost = on_lost
        self._left_behind: set[asyncio.Task[object]] = set()
        self._used_s: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            open=False,
            min_size=1,
            max_size=max_connections,
            max_waiting=_MAX_WAITING,
            timeout=_CHECKOUT_TIMEOUT_S,
            # Gives up a reconnection soon: the next call starts another one, without the pool's growing backoff.
            reconnect_timeout=0.5,
            check=self._check,
            configure=_configure,
            kwargs=connection_arguments(statement_timeout_s=deadline_s),
            name="registry",
        )

    async def open(self) -> None:
        """Starts connecting in the background."""
        await self._pool.open()

    async def close(self) -> None:
        """Closes every connection."""
        for task in self._left_behind:
            task.cancel()
        await self._pool.close(timeout=2.0)

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """Runs `work` in one transaction, again if the connection was lost. Raises DatabaseUnavailable.

        It returns or raises within `deadline_s`, the pool's own deadline at most, and the time to cancel a statement.
        """
        return await self._run(work, deadline_s, autocommit=False)

    async def single(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """Runs one statement, a transaction by itself, like `run`: saves the round trips of BEGIN and COMMIT."""
        return await self._run(work, deadline_s, autocommit=True)

    async def _run(
        self, work: Callable[[Connection], Awaitable[T]], deadline_s: float | None, *, autocommit: bool
    ) -> T:
        limit_s = min(self._deadline_s, deadline_s or self._deadline_s)
        task = asyncio.create_task(self._attempts(work, limit_s, autocommit=autocommit))
        try:
            await asyncio.wait({task}, timeout=limit_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_CANCEL_GRACE_S)
                if not task.done():  # The set keeps it from being collected while it runs.
                    self._left_behind.add(task)
                    task.add_done_callback(self._left_behind.discard)
        if not task.done() or task.cancelled():
            raise _unavailable()
        return task.result()

    async def _attempts(self, work: Callable[[Connection], Awaitable[T]], limit_s: float, *, autocommit: bool) -> T:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(TRANSIENT),
            stop=stop_after_delay(limit_s),
            wait=wait_random_exponential(multiplier=0.05, max=0.5),
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    return await self._once(work, autocommit=autocommit)
        except TRANSIENT as exc:
            log.warning("database: %s: %s", type(exc).__name__, str(exc).strip())
            raise _unavailable() from exc
        raise AssertionError("tenacity ended without a result")

    async def _once(self, work: Callable[[Connection], Awaitable[T]], *, autocommit: bool) -> T:
        try:
            async with self._pool.connection() as conn:
                if conn.autocommit is not autocommit:
                    await conn.set_autocommit(autocommit)  # A flag of the client alone: no round trip.
                result = await work(conn)
                self._used_s[conn] = time.monotonic()
                return result
        except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
            raise  # Transient, but the connection is fine.
        except TRANSIENT:
            self._on_lost()
            raise

    async def _check(self, conn: Connection) -> None:
        """Tries a connection, unless it answered a moment ago: a round trip that every call would pay otherwise."""
        if time.monotonic() - self._used_s.get(conn, 0.0) > _ALIVE_FOR_S:
            await AsyncConnectionPool.check_connection(conn)


async def _configure(conn: Connection) -> None:
    # JSON columns are half the cost of a page of models, and the standard library's parser takes four times as long.
    set_json_loads(orjson.loads, conn)


def connection_arguments(*, statement_timeout_s: float) -> dict[str, object]:
    """Returns the arguments of every connection: rows as dicts, UTC, a limit on each statement and each socket."""
    milliseconds = int(statement_timeout_s * 1000)
    return {
        "row_factory": dict_row,
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": milliseconds,
        "application_name": "headrace-registry",
        "options": (
            f"-c statement_timeout={milliseconds} -c timezone=UTC"
            f" -c idle_in_transaction_session_timeout={milliseconds * 2}"
        ),
    }


def _unavailable() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "the registry's database can't be reached; try again, and look at the registry's log if it stays so",
        retry_after_s=_RETRY_AFTER_S,
    )
