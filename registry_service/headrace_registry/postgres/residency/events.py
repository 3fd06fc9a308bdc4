"""Residency events in Postgres: a log that a reader can resume by `seq` without missing an event.

Events are written in the transactions that move residencies, and numbered by the first reader that sees them, under the
log's lock. So `seq` grows in the order in which events become readable: once a reader has read up to a `seq`, no event
with a smaller one appears any more, however transactions overlap.
"""

from __future__ import annotations

from headrace_registry.postgres import statements
from headrace_registry.postgres.rows import Row, residency_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.events import EventBatch, ResidencyEvent

# Conflicts with other publishers only. It takes no snapshot, so the next statement sees the tables as after the wait.
LOG_LOCK = "LOCK TABLE residency_log IN EXCLUSIVE MODE"
# Makes a snapshot and its `seq` be of one moment; must come before any other statement.
ONE_MOMENT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
LOG_HEAD = """
SELECT head, EXISTS (SELECT 1 FROM residency_events WHERE seq IS NULL) AS unpublished,
       (SELECT COALESCE(min(seq), head + 1) FROM residency_events) AS first, registry_now() AS now
FROM residency_log
"""
EVENTS_PUBLISH = """
WITH numbered AS (
    SELECT e.id, l.head + row_number() OVER (ORDER BY e.id) AS seq
    FROM residency_events e CROSS JOIN residency_log l WHERE e.seq IS NULL
), published AS (
    UPDATE residency_events e SET seq = n.seq FROM numbered n WHERE e.id = n.id
)
UPDATE residency_log SET head = head + (SELECT count(*) FROM numbered)
"""
EVENTS_AFTER = """
SELECT seq, time, residency FROM residency_events
WHERE seq > %(after_seq)s AND seq <= %(upto_seq)s AND (%(model_id)s = '' OR model_id = %(model_id)s)
ORDER BY seq LIMIT %(limit)s
"""
EVENTS_TRIM = """
DELETE FROM residency_events WHERE id IN (
    SELECT id FROM residency_events WHERE seq <= (SELECT head FROM residency_log) - %(keep)s
    ORDER BY seq LIMIT %(limit)s)
"""
RESIDENCIES_ACTIVE = (
    statements.RESIDENCY_IN_FULL
    + """
WHERE (%(model_id)s = '' OR r.model_id = %(model_id)s) AND r.state NOT IN ('UNLOADED', 'FAILED', 'LOST')
ORDER BY r.create_time, r.id
"""
)

# Hours of a busy cluster. A watcher that was away for longer begins with a snapshot again.
KEEP_EVENTS = 20_000
_EVENTS_PER_READ = 200


class EventStore:
    """Reads for WatchResidencies, and the numbering and trimming of the log."""

    def __init__(self, database: Database, *, keep: int = KEEP_EVENTS) -> None:
        self._database = database
        self._keep = keep

    async def snapshot(self, model_id: str) -> EventBatch:
        """Reads the active residencies (of one model, or all) and the log's head of the same moment.

        Only the last event carries that head: a watcher cut off before it has not seen the snapshot, and begins anew.
        """

        async def work(conn: Connection) -> EventBatch:
            await conn.execute(ONE_MOMENT)
            await _publish(conn)
            head = await _head(conn)
            rows = await (await conn.execute(RESIDENCIES_ACTIVE, {"model_id": model_id})).fetchall()
            numbers = [*(0 for _ in rows[1:]), head["head"]]
            events = (
                ResidencyEvent(seq=seq, time=head["now"], residency=residency_of(row), snapshot=True)
                for seq, row in zip(numbers, rows, strict=False)
            )
            return EventBatch(seq=head["head"], events=tuple(events))

        return await self._database.run(work)

    async def after(self, seq: int, model_id: str) -> EventBatch | None:
        """Returns the next events, perhaps none; None if the log was trimmed beyond `seq`."""

        async def work(conn: Connection) -> EventBatch | None:
            head = await _head(conn)
            if head["unpublished"]:
                await _publish(conn)
                head = await _head(conn)
            if not head["first"] <= seq + 1 <= head["head"] + 1:
                return None
            parameters = {"after_seq": seq, "upto_seq": head["head"], "model_id": model_id, "limit": _EVENTS_PER_READ}
            rows = await (await conn.execute(EVENTS_AFTER, parameters)).fetchall()
            events = tuple(
                ResidencyEvent(seq=row["seq"], time=row["time"], residency=residency_of(row["residency"]))
                for row in rows
            )
            return EventBatch(seq=events[-1].seq if len(events) == _EVENTS_PER_READ else head["head"], events=events)

        return await self._database.run(work)

    async def trim(self, limit: int) -> int:
        """Deletes up to `limit` of the oldest events beyond the number to keep; returns how many."""

        async def work(conn: Connection) -> int:
            await _publish(conn)
            return (await conn.execute(EVENTS_TRIM, {"keep": self._keep, "limit": limit})).rowcount

        return await self._database.run(work)


async def _publish(conn: Connection) -> None:
    await conn.execute(LOG_LOCK)
    await conn.execute(EVENTS_PUBLISH)


async def _head(conn: Connection) -> Row:
    row = await (await conn.execute(LOG_HEAD)).fetchone()
    assert row is not None
    return row
