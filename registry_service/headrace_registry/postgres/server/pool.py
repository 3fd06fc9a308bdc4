"""One door to Postgres: bounded waits, transactions retried over lost connections, one typed error when it is away."""

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

# Lost connections, a server that starts or stops, deadlocks and serialization failures: all safe to run again, because
# a transaction either committed or left nothing, and one that may have committed is idempotent or ends by its lease.
TRANSIENT = (psycopg.OperationalError, psycopg.InterfaceError, PoolClosed)

_CALL_DEADLINE_S = 10.0
# A cancelled statement is told so over a second connection; a server that does not even take that is left behind.
_CANCEL_GRACE_S = 1.0
_CHECKOUT_TIMEOUT_S = 2.0
_MAX_CONNECTIONS = 10
_MAX_WAITING = 500
_RETRY_AFTER_S = 1.0
# One that answered so recently is taken for alive; should it not be, the transaction is run again.
_ALIVE_FOR_S = 0.5


class Database:
    """The pool of one process. `open` before use, `close` after."""

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
            # Give up a reconnection soon: the next call starts another one, without the pool's growing back-off.
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
        """Runs `work` in one transaction, again if the connection was lost. Raises DatabaseUnavailable in time."""
        return await self._run(work, deadline_s, autocommit=False)

    async def single(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """Like `run` for one statement, which is a transaction by itself: it saves the two round trips around it."""
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
                await self._give_up(task)
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
                    await conn.set_autocommit(autocommit)  # A flag of the client's; the server hears nothing.
                result = await work(conn)
                self._used_s[conn] = time.monotonic()
                return result
        except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
            raise
        except TRANSIENT:
            self._on_lost()
            raise

    async def _check(self, conn: Connection) -> None:
        """Asks a connection whether it is alive, unless it was a moment ago: a round trip that every call would pay."""
        if time.monotonic() - self._used_s.get(conn, 0.0) > _ALIVE_FOR_S:
            await AsyncConnectionPool.check_connection(conn)

    async def _give_up(self, task: asyncio.Task[T]) -> None:
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_GRACE_S)
        if not task.done():
            self._left_behind.add(task)
            task.add_done_callback(self._left_behind.discard)


async def _configure(conn: Connection) -> None:
    """JSON columns are half of what a page of models costs; the standard library's parser takes four times as long."""
    set_json_loads(orjson.loads, conn)


def connection_arguments(*, statement_timeout_s: float) -> dict[str, object]:
    """Arguments of every connection: rows as dicts, UTC, no statement or socket that waits for ever."""
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
