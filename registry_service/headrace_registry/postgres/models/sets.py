"""Activation sets in Postgres: the reports of nodes on them, their pins, and orders to delete them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from headrace_registry.errors import SetNotFound, StateConflict
from headrace_registry.models.sets import ActivationSet, SetOrders, SetPin, SetReport
from headrace_registry.paging import Page
from headrace_registry.postgres.requests import Request, recall, remember
from headrace_registry.postgres.residency.nodes import hear
from headrace_registry.postgres.rows import Row, set_of, set_pin_of
from headrace_registry.postgres.server.pool import Connection, Database

# `least`: a node's clock may be ahead, and no set was last used in the future.
SET_UPSERT = """
INSERT INTO activation_sets
    (id, node_id, model_id, corpus_id, columns, n_rows, size_bytes, complete, retention, path, last_used_time, holders,
     identity_json)
VALUES (%(id)s, %(node_id)s, %(model_id)s, %(corpus_id)s, %(columns)s, %(n_rows)s, %(size_bytes)s, %(complete)s,
        %(retention)s, %(path)s, least(coalesce(%(last_used_time)s::timestamptz, registry_now()), registry_now()),
        %(holders)s, %(identity_json)s)
ON CONFLICT (id, node_id) DO UPDATE
SET model_id = excluded.model_id, corpus_id = excluded.corpus_id, columns = excluded.columns,
    n_rows = excluded.n_rows, size_bytes = excluded.size_bytes, complete = excluded.complete,
    retention = excluded.retention, path = excluded.path, update_time = registry_now(),
    last_used_time = excluded.last_used_time, holders = excluded.holders, identity_json = excluded.identity_json
RETURNING deleting
"""
SET_DELETE = "DELETE FROM activation_sets WHERE id = %(id)s AND node_id = %(node_id)s"
# Comes before pins are read, in a statement of its own: of a pin and an eviction at the same time, one sees the other.
SET_LOCK = "SELECT * FROM activation_sets WHERE id = %(id)s ORDER BY node_id FOR UPDATE"
SET_READ = "SELECT * FROM activation_sets WHERE id = %(id)s ORDER BY node_id"
SETS_LIST = """
SELECT * FROM activation_sets
WHERE (%(model_id)s = '' OR model_id = %(model_id)s) AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND (%(after_time)s::timestamptz IS NULL
       OR (create_time, id, node_id) < (%(after_time)s::timestamptz, %(after_id)s, %(after_node)s))
ORDER BY create_time DESC, id DESC, node_id DESC LIMIT %(limit)s
"""
SETS_COUNT = """
SELECT count(*) AS n FROM activation_sets
WHERE (%(model_id)s = '' OR model_id = %(model_id)s) AND (%(node_id)s = '' OR node_id = %(node_id)s)
"""
# Living nodes only: a silent node's last report on its readers may no longer be true.
SET_HOLDERS = """
SELECT sets.node_id, sets.holders FROM activation_sets sets JOIN nodes ON nodes.id = sets.node_id
WHERE sets.id = %(id)s AND sets.holders <> '{}' AND nodes.state <> 'LOST' ORDER BY sets.node_id
"""
SET_ORDER_DELETION = "UPDATE activation_sets SET deleting = true, update_time = registry_now() WHERE id = %(id)s"
SET_PINS = """
SELECT * FROM set_pins WHERE set_id = ANY(%(ids)s) AND (expire_time IS NULL OR expire_time > registry_now())
ORDER BY set_id, owner
"""
SET_PIN_UPSERT = """
INSERT INTO set_pins (set_id, owner, reason, expire_time)
VALUES (%(set_id)s, %(owner)s, %(reason)s, %(expire_time)s)
ON CONFLICT (set_id, owner) DO UPDATE SET reason = excluded.reason, expire_time = excluded.expire_time
"""
SET_PIN_DELETE = "DELETE FROM set_pins WHERE set_id = %(set_id)s AND owner = %(owner)s"
IS_PAST = "SELECT %(expire_time)s::timestamptz <= registry_now() AS is_past"


class SetStore:
    """Reads and writes for ActivationSetService."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def report(self, report: SetReport, *, epoch: int, deleted: bool) -> SetOrders:
        """Replaces the node's last report on the set; returns the pins and orders for the node. Raises EpochStale."""

        async def work(conn: Connection) -> SetOrders:
            await hear(conn, report.node_id, epoch)
            if deleted:
                await conn.execute(SET_DELETE, {"id": report.id, "node_id": report.node_id})
                return SetOrders()
            values = {**asdict(report), "columns": list(report.columns), "holders": list(report.holders)}
            row = await (await conn.execute(SET_UPSERT, values)).fetchone()
            assert row is not None
            return SetOrders.of(await _pins(conn, [report.id]), delete=row["deleting"])

        return await self._database.run(work)

    async def evict(self, set_id: str, *, node_id: str, epoch: int) -> SetOrders:
        """Removes a node's set from the list unless it is pinned: the node may delete it. Raises EpochStale."""

        async def work(conn: Connection) -> SetOrders:
            await hear(conn, node_id, epoch)
            await conn.execute(SET_LOCK, {"id": set_id})
            orders = SetOrders.of(await _pins(conn, [set_id]), delete=False)
            if not orders.pinned:
                await conn.execute(SET_DELETE, {"id": set_id, "node_id": node_id})
            return orders

        return await self._database.run(work)

    async def pin(self, pin: SetPin, request: Request) -> None:
        """Sets, changes or, with an end that is past, removes a pin. Raises SetNotFound, StateConflict."""

        async def work(conn: Connection) -> None:
            if await recall(conn, request) is not None:
                return
            rows = await _locked(conn, pin.set_id)
            values = asdict(pin)
            past = await (await conn.execute(IS_PAST, {"expire_time": pin.expire_time})).fetchone()
            if past is not None and past["is_past"]:
                await conn.execute(SET_PIN_DELETE, values)
            else:
                _check_retained(pin.set_id, rows)
                if all(row["deleting"] for row in rows):
                    raise StateConflict(
                        f"activation set {pin.set_id} is being deleted; extract it again to pin it",
                        resource=("ActivationSet", pin.set_id),
                    )
                await conn.execute(SET_PIN_UPSERT, values)
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
            _check_unheld(set_id, await (await conn.execute(SET_HOLDERS, {"id": set_id})).fetchall())
            await conn.execute(SET_ORDER_DELETION, {"id": set_id})
            await remember(conn, request, "ordered")

        await self._database.run(work)

    async def get(self, set_id: str) -> list[ActivationSet]:
        """Returns the set as each node holds it. Raises SetNotFound."""

        async def work(conn: Connection) -> list[ActivationSet]:
            return await _with_pins(conn, await (await conn.execute(SET_READ, {"id": set_id})).fetchall())

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
            return await _with_pins(conn, await (await conn.execute(SETS_LIST, parameters)).fetchall())

        return page.cut(
            await self._database.run(work),
            lambda each: (each.create_time.isoformat(), each.report.id, each.report.node_id),
            lambda each: sum(len(name) + 4 for name in (*each.report.columns, *each.report.holders, each.report.path)),
        )

    async def count(self, *, model_id: str, node_id: str) -> int:
        """Counts the sets on all pages."""
        return await self._database.count(SETS_COUNT, {"model_id": model_id, "node_id": node_id})


async def _locked(conn: Connection, set_id: str) -> Sequence[Row]:
    rows = await (await conn.execute(SET_LOCK, {"id": set_id})).fetchall()
    if not rows:
        raise SetNotFound(set_id)
    return rows


async def _pins(conn: Connection, set_ids: Sequence[str]) -> list[SetPin]:
    return [set_pin_of(row) for row in await (await conn.execute(SET_PINS, {"ids": list(set_ids)})).fetchall()]


async def _with_pins(conn: Connection, rows: Sequence[Row]) -> list[ActivationSet]:
    pins = await _pins(conn, sorted({row["id"] for row in rows})) if rows else []
    return [
        replace(set_of(row), pins=tuple(pin for pin in pins if pin.set_id == row["id"])) if pins else set_of(row)
        for row in rows
    ]


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
