"""Residency events in Postgres: a log that a reader can resume by `seq` without missing one.

Events are written within the transactions that move residencies, and numbered by the first reader that sees them, under
the log's lock. So `seq` grows in the order in which events become readable: behind a `seq` that somebody has read,
nothing appears any more, however transactions overlap.
"""

from __future__ import annotations

from headrace_registry.postgres import statements as queries
from headrace_registry.postgres.residency import event_statements as event_queries
from headrace_registry.postgres.rows import Row, residency_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.events import Reading, ResidencyEvent

# Hours of a busy cluster. A watcher that was away for longer begins with a snapshot again.
KEEP_EVENTS = 20_000


_EVENTS_PER_READ = 200


class EventStore:
    """What WatchResidencies needs of the tables."""

    def __init__(self, database: Database, *, keep: int = KEEP_EVENTS) -> None:
        self._database = database
        self._keep = keep

    async def snapshot(self, model_id: str) -> Reading:
        """Reads the active residencies (of one model, or all) and the log's head of the same moment.

        Only the last event carries that head: who has not seen it has not seen the snapshot, and begins anew.
        """

        async def work(conn: Connection) -> Reading:
            await conn.execute(event_queries.ONE_MOMENT)
            await _publish(conn)
            head = await _head(conn)
            rows = await (await conn.execute(queries.RESIDENCIES_ACTIVE, {"model_id": model_id})).fetchall()
            numbers = [*(0 for _ in rows[1:]), head["head"]]
            events = (
                ResidencyEvent(seq=seq, time=head["now"], residency=residency_of(row), snapshot=True)
                for seq, row in zip(numbers, rows, strict=False)
            )
            return Reading(seq=head["head"], events=tuple(events))

        return await self._database.run(work)

    async def after(self, seq: int, model_id: str) -> Reading | None:
        """Returns the next events, perhaps none; None if what came behind `seq` is not kept any more."""

        async def work(conn: Connection) -> Reading | None:
            head = await _head(conn)
            if head["unpublished"]:
                await _publish(conn)
                head = await _head(conn)
            if not head["first"] <= seq + 1 <= head["head"] + 1:
                return None
            parameters = {"after_seq": seq, "upto_seq": head["head"], "model_id": model_id, "limit": _EVENTS_PER_READ}
            rows = await (await conn.execute(event_queries.EVENTS_AFTER, parameters)).fetchall()
            events = tuple(
                ResidencyEvent(seq=row["seq"], time=row["time"], residency=residency_of(row["residency"]))
                for row in rows
            )
            return Reading(seq=events[-1].seq if len(events) == _EVENTS_PER_READ else head["head"], events=events)

        return await self._database.run(work)

    async def trim(self) -> None:
        """Drops the oldest events beyond those kept."""

        async def work(conn: Connection) -> None:
            await _publish(conn)
            await conn.execute(event_queries.TRIM, {"keep": self._keep})

        await self._database.run(work)


async def _publish(conn: Connection) -> None:
    await conn.execute(event_queries.LOG_LOCK)
    await conn.execute(event_queries.PUBLISH)


async def _head(conn: Connection) -> Row:
    row = await (await conn.execute(event_queries.LOG_HEAD)).fetchone()
    assert row is not None
    return row
