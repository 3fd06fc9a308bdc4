"""Activation sets in Postgres, as nodes report them."""

from __future__ import annotations

from registry_service.errors import SetNotFound
from registry_service.paging import Page
from registry_service.postgres import queries
from registry_service.postgres.node_store import hear
from registry_service.postgres.pool import Connection, Database
from registry_service.postgres.rows import set_of
from registry_service.sets import ActivationSet, SetReport


class SetStore:
    """What ActivationSetService needs of the tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def report(self, report: SetReport, *, epoch: int, deleted: bool) -> None:
        """Replaces what the node said of the set before. Raises EpochStale."""

        async def work(conn: Connection) -> None:
            await hear(conn, report.node_id, epoch)
            if deleted:
                await conn.execute(queries.SET_DELETE, {"id": report.id, "node_id": report.node_id})
                return
            values = {
                "id": report.id,
                "node_id": report.node_id,
                "model_id": report.model_id,
                "corpus_id": report.corpus_id,
                "columns": list(report.columns),
                "n_rows": report.n_rows,
                "size_bytes": report.size_bytes,
                "complete": report.complete,
                "retention": report.retention,
                "path": report.path,
            }
            await conn.execute(queries.SET_UPSERT, values)

        await self._database.run(work)

    async def get(self, set_id: str) -> list[ActivationSet]:
        """Returns what each node holds of the set. Raises SetNotFound."""

        async def work(conn: Connection) -> list[ActivationSet]:
            return [set_of(row) for row in await (await conn.execute(queries.SET_READ, {"id": set_id})).fetchall()]

        found = await self._database.run(work)
        if not found:
            raise SetNotFound(set_id)
        return found

    async def page(self, *, model_id: str, page: Page) -> tuple[list[ActivationSet], str]:
        """Returns one page, the newest first, and the token of the next."""

        async def work(conn: Connection) -> list[ActivationSet]:
            after = page.after or ("", "", "")
            keys = {"after_time": page.time_after(), "after_id": after[1], "after_node": after[2]}
            parameters = {"model_id": model_id, "limit": page.size + 1, **keys}
            return [set_of(row) for row in await (await conn.execute(queries.SETS_LIST, parameters)).fetchall()]

        found = await self._database.run(work)
        more = len(found) > page.size
        found = found[: page.size]
        if not more:
            return found, ""
        last = found[-1]
        return found, page.token_after((last.create_time.isoformat(), last.report.id, last.report.node_id))
