"""Removes old rows in batches, a short transaction each, so that neither calls nor other loops wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.postgres.server.pool import Connection, Database

# `(SELECT registry_now())`: read once, so that an index by time serves. SKIP LOCKED: a row in use goes in a later one.
PURGES = {
    # A day is longer than any client retries one request.
    "requests": """
DELETE FROM requests WHERE (request_id, method) IN (
    SELECT request_id, method FROM requests WHERE create_time < (SELECT registry_now()) - interval '1 day'
    ORDER BY create_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
""",
    "leases": """
DELETE FROM leases WHERE id IN (
    SELECT id FROM leases WHERE state <> 'HELD' AND end_time < (SELECT registry_now()) - interval '1 day'
    ORDER BY end_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
""",
    # A week of ended residencies answers "what happened".
    "residencies": """
DELETE FROM residencies WHERE id IN (
    SELECT id FROM residencies
    WHERE state IN ('UNLOADED', 'FAILED', 'LOST') AND update_time < (SELECT registry_now()) - interval '7 days'
    ORDER BY update_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
""",
    # A watcher that was away for a week begins with a snapshot anyway.
    "model_events": """
DELETE FROM model_events WHERE (model_id, seq) IN (
    SELECT model_id, seq FROM model_events WHERE time < (SELECT registry_now()) - interval '7 days'
    ORDER BY time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
""",
    # The latest hundred of each model.
    "validation_attempts": """
DELETE FROM validation_attempts WHERE id IN (
    SELECT id FROM (
        SELECT id, done AND NOT held AS is_over,
               row_number() OVER (PARTITION BY model_id ORDER BY create_time DESC, id DESC) AS place
        FROM validation_attempts) ranked
    WHERE place > 100 AND is_over LIMIT %(limit)s)
""",
    "set_pins": """
DELETE FROM set_pins WHERE (set_id, owner) IN (
    SELECT set_id, owner FROM set_pins WHERE expire_time < (SELECT registry_now()) - interval '1 day'
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
""",
}

# The rows of a residency that go with it are a few hundred leases at most: a batch takes well under a second.
_BATCH = 500
# Between batches, for the calls that wait for a connection.
_PAUSE_S = 0.02


class Purge:
    """The removal of old rows, one table after the other."""

    def __init__(self, database: Database, events: EventStore, *, batch: int = _BATCH) -> None:
        self._database = database
        self._events = events
        self._batch = batch

    async def run(self) -> None:
        """Does one round."""
        for statement in PURGES.values():
            await self._in_batches(partial(self._delete, statement))
        await self._in_batches(partial(self._events.trim, self._batch))

    async def _in_batches(self, delete: Callable[[], Awaitable[int]]) -> None:
        n_deleted = await delete()
        while n_deleted == self._batch:
            await asyncio.sleep(_PAUSE_S)
            n_deleted = await delete()

    async def _delete(self, statement: str) -> int:
        async def work(conn: Connection) -> int:
            return (await conn.execute(statement, {"limit": self._batch})).rowcount

        return await self._database.run(work)
