"""Old rows are removed in small, idempotent statements."""

from __future__ import annotations

from headrace_registry.postgres import statements as queries
from headrace_registry.postgres.models import set_statements as set_queries
from headrace_registry.postgres.server.pool import Connection, Database


class UpkeepStore:
    """What the upkeep loop needs beside the other stores."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def purge(self) -> None:
        """Removes answered requests, ended leases, ended residencies and expired pins of sets that are old."""

        async def work(conn: Connection) -> None:
            for statement in (*queries.PURGE, set_queries.PURGE_PINS):
                await conn.execute(statement)

        await self._database.run(work)
