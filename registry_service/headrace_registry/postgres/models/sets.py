"""Activation sets in Postgres: what nodes report of them, who pins them, which shall go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace_registry.errors import SetNotFound, StateConflict
from headrace_registry.models.sets import ActivationSet, SetOrders, SetPin, SetReport
from headrace_registry.paging import Page
from headrace_registry.postgres.models import set_statements as set_queries
from headrace_registry.postgres.requests import Request, recall, remember
from headrace_registry.postgres.residency.nodes import hear
from headrace_registry.postgres.rows import Row, set_of, set_pin_of
from headrace_registry.postgres.server.pool import Connection, Database


class SetStore:
    """What ActivationSetService needs of the tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def report(self, report: SetReport, *, epoch: int, deleted: bool) -> SetOrders:
        """Replaces what the node said of the set before; returns what it must know. Raises EpochStale."""

        async def work(conn: Connection) -> SetOrders:
            await hear(conn, report.node_id, epoch)
            if deleted:
                await conn.execute(set_queries.DELETE, {"id": report.id, "node_id": report.node_id})
                return SetOrders()
            row = await (await conn.execute(set_queries.UPSERT, _values(report))).fetchone()
            assert row is not None
            return SetOrders.of(await _pins(conn, [report.id]), delete=row["deleting"])

        return await self._database.run(work)

    async def evict(self, set_id: str, *, node_id: str, epoch: int) -> SetOrders:
        """Takes a node's set off the list unless it is pinned. Raises EpochStale."""

        async def work(conn: Connection) -> SetOrders:
            await hear(conn, node_id, epoch)
            await conn.execute(set_queries.LOCK, {"id": set_id})
            orders = SetOrders.of(await _pins(conn, [set_id]), delete=False)
            if not orders.pinned:
                await conn.execute(set_queries.DELETE, {"id": set_id, "node_id": node_id})
            return orders

        return await self._database.run(work)

    async def pin(self, pin: SetPin, request: Request) -> None:
        """Sets, changes or, with an end that is past, removes a pin. Raises SetNotFound, StateConflict."""

        async def work(conn: Connection) -> None:
            if await recall(conn, request) is not None:
                return
            rows = await _locked(conn, pin.set_id)
            values = {
                "set_id": pin.set_id,
                "owner": pin.owner,
                "reason": pin.reason,
                "expire_time": pin.expire_time,
            }
            past = await (await conn.execute(set_queries.IS_PAST, {"expire_time": pin.expire_time})).fetchone()
            if past is not None and past["is_past"]:
                await conn.execute(set_queries.UNPIN, values)
            else:
                _check_kept(pin.set_id, rows)
                await conn.execute(set_queries.PIN, values)
            await remember(conn, request, "pinned")

        await self._database.run(work)

    async def delete(self, set_id: str, request: Request) -> None:
        """Orders the nodes to remove a set. Raises SetNotFound, StateConflict while it is pinned or used."""

        async def work(conn: Connection) -> None:
            if await recall(conn, request) is not None:
                return
            rows = await _locked(conn, set_id)
            _check_retained(set_id, rows)
            _check_unpinned(set_id, await _pins(conn, [set_id]))
            _check_unheld(set_id, await (await conn.execute(set_queries.HELD, {"id": set_id})).fetchall())
            await conn.execute(set_queries.ORDER_DELETION, {"id": set_id})
            await remember(conn, request, "ordered")

        await self._database.run(work)

    async def get(self, set_id: str) -> list[ActivationSet]:
        """Returns what each node holds of the set. Raises SetNotFound."""

        async def work(conn: Connection) -> list[ActivationSet]:
            return await _with_pins(conn, await (await conn.execute(set_queries.READ, {"id": set_id})).fetchall())

        found = await self._database.run(work)
        if not found:
            raise SetNotFound(set_id)
        return found

    async def page(self, *, model_id: str, node_id: str, page: Page) -> tuple[list[ActivationSet], str]:
        """Returns one page, the newest first, and the token of the next."""

        async def work(conn: Connection) -> list[ActivationSet]:
            after = page.after or ("", "", "")
            keys = {"after_time": page.time_after(), "after_id": after[1], "after_node": after[2]}
            parameters = {"model_id": model_id, "node_id": node_id, "limit": page.size + 1, **keys}
            return await _with_pins(conn, await (await conn.execute(set_queries.LIST, parameters)).fetchall())

        found = await self._database.run(work)
        more = len(found) > page.size
        found = found[: page.size]
        if not more:
            return found, ""
        last = found[-1]
        return found, page.token_after((last.create_time.isoformat(), last.report.id, last.report.node_id))


async def _locked(conn: Connection, set_id: str) -> Sequence[Row]:
    rows = await (await conn.execute(set_queries.LOCK, {"id": set_id})).fetchall()
    if not rows:
        raise SetNotFound(set_id)
    return rows


async def _pins(conn: Connection, set_ids: Sequence[str]) -> list[SetPin]:
    return [set_pin_of(row) for row in await (await conn.execute(set_queries.PINS, {"ids": list(set_ids)})).fetchall()]


async def _with_pins(conn: Connection, rows: Sequence[Row]) -> list[ActivationSet]:
    pins = await _pins(conn, sorted({row["id"] for row in rows})) if rows else []
    return [
        replace(set_of(row), pins=tuple(pin for pin in pins if pin.set_id == row["id"])) if pins else set_of(row)
        for row in rows
    ]


def _check_kept(set_id: str, rows: Sequence[Row]) -> None:
    _check_retained(set_id, rows)
    if all(row["deleting"] for row in rows):
        raise StateConflict(
            f"activation set {set_id} is being deleted; extract it again to pin it",
            resource=("ActivationSet", set_id),
        )


def _check_retained(set_id: str, rows: Sequence[Row]) -> None:
    if all(row["retention"] == "WINDOW" for row in rows):
        raise StateConflict(
            f"activation set {set_id} is a window that its readers keep; cancel its extraction to end it, or extract "
            "with RETAIN",
            resource=("ActivationSet", set_id),
        )


def _check_unpinned(set_id: str, pins: Sequence[SetPin]) -> None:
    if pins:
        owners = ", ".join(pin.owner for pin in pins[:20])
        raise StateConflict(
            f"activation set {set_id} is pinned by {owners}; unpin it first",
            metadata={"pin_owners": owners},
            resource=("ActivationSet", set_id),
        )


def _check_unheld(set_id: str, rows: Sequence[Row]) -> None:
    if rows:
        holders = ", ".join(f"{holder} on {row['node_id']}" for row in rows for holder in row["holders"])[:1000]
        raise StateConflict(
            f"activation set {set_id} is used by {holders}; wait for them, or cancel the extractions",
            metadata={"holders": holders},
            resource=("ActivationSet", set_id),
        )


def _values(report: SetReport) -> dict[str, object]:
    return {
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
        "last_used_time": report.last_used_time,
        "holders": list(report.holders),
    }
