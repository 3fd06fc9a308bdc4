"""Transactions over a pool: bounded waits, retries over lost connections, one typed error when Postgres is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from headrace_chassis.deadline import remaining_s
from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.postgres.server.recipe import Connection, ConnectionRecipe

__all__ = ["DEFAULT_CONNECTIONS", "Connection", "Database"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# A server that turned read-only, and a transaction that outlived its limit while this process was stopped. The
# connection is of no use any more; psycopg counts neither among its operational errors.
_SPOILT = (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.IdleInTransactionSessionTimeout)
# Lost connections, a server that starts or stops, deadlocks and serialization failures. All are safe to run again: a
# transaction either committed or left nothing, and one that may have committed is idempotent or ends by its lease.
TRANSIENT = (psycopg.OperationalError, psycopg.InterfaceError, PoolClosed, *_SPOILT)
# Transient, but the server answers.
_CONTENDED = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.QueryCanceled,
    psycopg.errors.LockNotAvailable,
    PoolTimeout,
    TooManyRequests,
)

_CALL_DEADLINE_S = 10.0
# Cancelling a statement takes a second connection. A server that does not answer that either is not waited for.
_CANCEL_GRACE_S = 1.0
_CHECKOUT_TIMEOUT_S = 2.0
DEFAULT_CONNECTIONS = 10
_MAX_WAITING = 500
_RETRY_AFTER_S = 1.0
# A connection that answered this recently counts as alive; if it is dead after all, the transaction is run again.
_ALIVE_FOR_S = 0.5
_TRY_EVERY_S = 2.0
# Restarts and failovers within this time pass unseen. Behind it, calls are answered after one quick attempt.
_PATIENCE_S = 3.0
_QUICK_S = 0.5
# Left of a call's own deadline for its answer: an error with its reason is worth more than DEADLINE_EXCEEDED.
_ANSWER_S = 0.25


class Database:
    """The connection pool of one process. `open` before use, `close` after."""

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = _CALL_DEADLINE_S,
        max_connections: int = DEFAULT_CONNECTIONS,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._deadline_s = deadline_s
        self._on_lost = on_lost
        self._recipe = ConnectionRecipe.of(url)
        self._away_since: float | None = None
        self._left_behind: set[asyncio.Task[object]] = set()
        self._used_s: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._tried_s: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            open=False,
            min_size=1,
            max_size=max_connections,
            max_waiting=_MAX_WAITING,
            timeout=_CHECKOUT_TIMEOUT_S,
            # Gives up a reconnection soon: the next call starts another one, without the pool's growing backoff.
            reconnect_timeout=0.5,
            reconnect_failed=lambda _pool: self._lost(),
            check=self._check,
            configure=lambda conn: self._recipe.prepare(conn, timeout_s=deadline_s),
            kwargs=self._recipe.arguments(timeout_s=deadline_s),
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

        It returns or raises within `deadline_s`, the pool's own deadline and that of the call at most, and the time to
        cancel a statement. While the database is known to be away it raises after a quick attempt.
        """
        return await self._run(work, deadline_s, autocommit=False)

    async def single(self, work: Callable[[Connection], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """Runs one statement, a transaction by itself, like `run`: saves the round trips of BEGIN and COMMIT."""
        return await self._run(work, deadline_s, autocommit=True)

    async def count(self, statement: str | sql.Composed, parameters: Mapping[str, Any]) -> int:
        """Runs a statement that selects one number, `n`."""

        async def work(conn: Connection) -> int:
            row = await (await conn.execute(statement, parameters)).fetchone()
            return int(row["n"]) if row is not None else 0

        return await self.single(work)

    async def answers(self, *, deadline_s: float) -> bool:
        """True if the database takes writes; False if it is away, read-only or does not answer in time."""
        try:
            await self.single(_probe, deadline_s=deadline_s)
        except DatabaseUnavailable:
            return False
        return True

    async def _run(
        self, work: Callable[[Connection], Awaitable[T]], deadline_s: float | None, *, autocommit: bool
    ) -> T:
        limit_s = min(self._deadline_s, deadline_s or self._deadline_s)
        if (left_s := remaining_s()) is not None:
            limit_s = min(limit_s, max(left_s - _ANSWER_S, left_s / 2))
        if self._away_s() > _PATIENCE_S:
            limit_s = min(limit_s, _QUICK_S)
        task = asyncio.create_task(self._attempts(work, limit_s, autocommit=autocommit))
        try:
            await asyncio.wait({task}, timeout=limit_s)
        finally:
            if not task.done():
                task.cancel()
                left_s = remaining_s()
                grace_s = _CANCEL_GRACE_S if left_s is None else min(_CANCEL_GRACE_S, left_s / 2)
                await asyncio.wait({task}, timeout=grace_s)
                if not task.done():  # The set keeps it from being collected while it runs.
                    self._left_behind.add(task)
                    task.add_done_callback(self._left_behind.discard)
        if not task.done() or task.cancelled():
            raise self._unavailable()
        return task.result()

    async def _attempts(self, work: Callable[[Connection], Awaitable[T]], limit_s: float, *, autocommit: bool) -> T:
        began = time.monotonic()

        def is_enough(_state: RetryCallState) -> bool:
            return time.monotonic() - began >= limit_s or self._away_s() > _PATIENCE_S

        attempts = AsyncRetrying(
            retry=retry_if_exception_type(TRANSIENT),
            stop=is_enough,
            wait=wait_random_exponential(multiplier=0.05, max=0.5),
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    return await self._once(work, autocommit=autocommit)
        except TRANSIENT as exc:
            log.warning("database: %s: %s", type(exc).__name__, self._recipe.without_secrets(str(exc).strip()))
            raise self._unavailable() from exc
        raise AssertionError("tenacity ended without a result")

    async def _once(self, work: Callable[[Connection], Awaitable[T]], *, autocommit: bool) -> T:
        try:
            async with self._pool.connection() as conn:
                if conn.autocommit is not autocommit:
                    await conn.set_autocommit(autocommit)  # A flag of the client alone: no round trip.
                try:
                    result = await work(conn)
                except _SPOILT:
                    await conn.close()  # The pool makes another one, to a server that takes writes.
                    raise
                self._used_s[conn] = time.monotonic()
        except _CONTENDED:
            raise
        except TRANSIENT:
            self._lost()
            raise
        self._away_since = None
        return result

    async def _check(self, conn: Connection) -> None:
        """Tries a connection, unless it answered a moment ago: a round trip that every call would pay otherwise.

        A connection that is never idle is tried now and then too: reads go on while its server takes no more writes.
        """
        now = time.monotonic()
        if now - self._used_s.get(conn, 0.0) <= _ALIVE_FOR_S and now - self._tried_s.get(conn, 0.0) <= _TRY_EVERY_S:
            return
        await conn.set_autocommit(True)
        try:
            await _probe(conn)
        except psycopg.Error:
            await conn.close()
            raise
        self._tried_s[conn] = time.monotonic()

    def _away_s(self) -> float:
        """Seconds for which no connection has been had; 0 while the database answers."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    def _unavailable(self) -> DatabaseUnavailable:
        error = DatabaseUnavailable(
            "the registry's database can't be reached or takes no writes; try again, and look at the registry's log if "
            "it stays so",
            retry_after_s=_RETRY_AFTER_S,
        )
        # A short failover is waited out, here and by the client's gRPC. After that an answer at once is worth more.
        error.waited = self._away_s() > _PATIENCE_S
        return error

    def _lost(self) -> None:
        self._away_since = self._away_since or time.monotonic()
        self._on_lost()


async def _probe(conn: Connection) -> None:
    """Raises ReadOnlySqlTransaction if the server takes no writes."""
    row = await (await conn.execute("SHOW transaction_read_only")).fetchone()
    if row is None or row["transaction_read_only"] != "off":
        raise psycopg.errors.ReadOnlySqlTransaction("the server takes no writes")
