"""Pins in Postgres. They are set under the devices' locks: once the call has answered, the model is not evicted."""

from __future__ import annotations

from headrace_registry.errors import FieldInvalid, ModelNotFound, NodeNotFound
from headrace_registry.paging import Page
from headrace_registry.postgres import statements
from headrace_registry.postgres.requests import Request, recall, remember
from headrace_registry.postgres.residency.node_views import lock_one_or_all
from headrace_registry.postgres.rows import pin_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.pins import Pin
from headrace_registry.wakeups import Wakeups

IS_IN_FUTURE = "SELECT %(expire_time)s::timestamptz > registry_now() AS in_future"
PIN_UPSERT = """
INSERT INTO pins (model_id, node_id, owner, reason, expire_time)
VALUES (%(model_id)s, %(node_id)s, %(owner)s, %(reason)s, %(expire_time)s)
ON CONFLICT (model_id, node_id, owner) DO UPDATE
SET reason = excluded.reason, expire_time = excluded.expire_time,
    create_time = CASE WHEN pins.expire_time <= registry_now() THEN registry_now() ELSE pins.create_time END
RETURNING *
"""
PIN_READ = "SELECT * FROM pins WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND owner = %(owner)s"
PIN_DELETE = """
DELETE FROM pins WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND owner = %(owner)s
RETURNING expire_time IS NULL OR expire_time > registry_now() AS living
"""
PINS_LIST = """
SELECT * FROM pins
WHERE (%(model_id)s = '' OR model_id = %(model_id)s) AND (expire_time IS NULL OR expire_time > registry_now())
  AND (%(after_model)s::text IS NULL
       OR (model_id, node_id, owner) > (%(after_model)s, %(after_node)s, %(after_owner)s))
ORDER BY model_id, node_id, owner LIMIT %(limit)s
"""
PIN_OWNERS = """
SELECT DISTINCT owner FROM pins
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id IN ('', %(node_id)s))
  AND (expire_time IS NULL OR expire_time > registry_now())
ORDER BY owner LIMIT 20
"""
# Pinned models that are on no device that their pin names; a pin of any node is met by any device.
PINS_UNMET = """
SELECT DISTINCT ON (p.model_id, p.node_id) p.* FROM pins p JOIN models m ON m.id = p.model_id
WHERE m.state = 'READY' AND p.node_id IN ('', %(node_id)s) AND (p.expire_time IS NULL OR p.expire_time > registry_now())
  AND NOT EXISTS (
      SELECT 1 FROM residencies r
      WHERE r.model_id = p.model_id AND (p.node_id = '' OR r.node_id = p.node_id)
        AND r.state IN ('QUEUED', 'LOADING', 'RESIDENT', 'DRAINING'))
ORDER BY p.model_id, p.node_id, p.create_time LIMIT 64
"""
PINS_PURGE = "DELETE FROM pins WHERE expire_time <= registry_now() RETURNING model_id, node_id, owner"
NODE_IS_KNOWN = "SELECT 1 FROM nodes WHERE id = %(node_id)s"
# An event without a transition: the residency's row keeps the reason of its last transition.
NOTE_OF_MODEL = (
    """
INSERT INTO residency_events (residency_id, model_id, state, reason, actor, residency)
SELECT r.id, r.model_id, r.state, %(reason)s, %(actor)s,
       to_jsonb(r) || jsonb_build_object('reason', %(reason)s::text, 'actor', %(actor)s::text)
FROM ("""
    + statements.RESIDENCY_IN_FULL
    + """
    WHERE r.model_id = %(model_id)s AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
      AND r.state NOT IN ('UNLOADED', 'FAILED', 'LOST')) r
ORDER BY r.create_time, r.id
"""
)


class PinStore:
    """Reads and writes for PinModel, UnpinModel, ListPins and the expiry of pins."""

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups

    async def pin(self, pin: Pin, request: Request) -> Pin:
        """Sets or changes a pin. Raises ModelNotFound, NodeNotFound, FieldInvalid for an end that is past."""

        async def work(conn: Connection) -> Pin:
            if await (await conn.execute(statements.MODEL_KEEP, {"id": pin.model_id})).fetchone() is None:
                raise ModelNotFound(pin.model_id)
            key = _key(pin.model_id, pin.node_id, pin.owner)
            if await recall(conn, request) is not None:
                row = await (await conn.execute(PIN_READ, key)).fetchone()
                return pin_of(row) if row is not None else pin
            if pin.node_id and await (await conn.execute(NODE_IS_KNOWN, {"node_id": pin.node_id})).fetchone() is None:
                raise NodeNotFound(pin.node_id)
            if (end := pin.expire_time) is not None:
                row = await (await conn.execute(IS_IN_FUTURE, {"expire_time": end})).fetchone()
                if row is None or not row["in_future"]:
                    raise FieldInvalid("pin.expire_time", f"{end.isoformat()} is past; give a later one, or none")
            await lock_one_or_all(conn, pin.node_id)
            values = {**key, "reason": pin.reason, "expire_time": pin.expire_time}
            row = await (await conn.execute(PIN_UPSERT, values)).fetchone()
            assert row is not None
            await _note(conn, pin.model_id, pin.node_id, reason=pin.words, actor=pin.owner)
            await remember(conn, request, "pinned")
            return pin_of(row)

        pinned = await self._database.run(work)
        self._wakeups.wake()
        return pinned

    async def unpin(self, model_id: str, *, node_id: str, owner: str, actor: str, request: Request) -> None:
        """Removes a pin; it is no error if there is no such pin."""

        async def work(conn: Connection) -> None:
            if await recall(conn, request) is not None:
                return
            row = await (await conn.execute(PIN_DELETE, _key(model_id, node_id, owner))).fetchone()
            if row is not None and row["living"]:
                await _note(conn, model_id, node_id, reason=f"the pin of {owner} was removed", actor=actor)
            await remember(conn, request, "unpinned")

        await self._database.run(work)
        self._wakeups.wake()

    async def page(self, *, model_id: str, page: Page) -> tuple[list[Pin], str]:
        """Returns one page of living pins by model, node and owner, and the token of the next."""

        async def work(conn: Connection) -> list[Pin]:
            after = page.after or (None, None, None)
            parameters = {
                "model_id": model_id,
                "after_model": after[0],
                "after_node": after[1],
                "after_owner": after[2],
                "limit": page.size + 1,
            }
            return [pin_of(row) for row in await (await conn.execute(PINS_LIST, parameters)).fetchall()]

        return page.cut(await self._database.run(work), lambda pin: (pin.model_id, pin.node_id, pin.owner))

    async def purge(self) -> int:
        """Removes expired pins, with an event for each residency they kept; returns how many."""

        async def work(conn: Connection) -> int:
            rows = await (await conn.execute(PINS_PURGE)).fetchall()
            for row in rows:
                reason = f"the pin of {row['owner']} expired"
                await _note(conn, row["model_id"], row["node_id"], reason=reason, actor="registry")
            return len(rows)

        n_expired = await self._database.run(work)
        if n_expired:
            self._wakeups.wake()
        return n_expired


async def unmet_pins(conn: Connection, node_id: str) -> list[Pin]:
    """Returns the pins that a start of this node may meet, one for each model and place, 64 at most."""
    return [pin_of(row) for row in await (await conn.execute(PINS_UNMET, {"node_id": node_id})).fetchall()]


async def pin_owners(conn: Connection, model_id: str, node_id: str) -> list[str]:
    """Returns the owners of the model's pins on the node (empty: on any), 20 at most."""
    parameters = {"model_id": model_id, "node_id": node_id}
    return [row["owner"] for row in await (await conn.execute(PIN_OWNERS, parameters)).fetchall()]


async def _note(conn: Connection, model_id: str, node_id: str, *, reason: str, actor: str) -> None:
    values = {"model_id": model_id, "node_id": node_id, "reason": reason, "actor": actor}
    await conn.execute(NOTE_OF_MODEL, values)


def _key(model_id: str, node_id: str, owner: str) -> dict[str, str]:
    return {"model_id": model_id, "node_id": node_id, "owner": owner}
