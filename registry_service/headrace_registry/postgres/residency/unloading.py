"""Sends a model off its devices on somebody's word. The caller may hold the model's row; devices are locked here."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_registry.errors import ModelInUse
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.node_views import lock_place
from headrace_registry.postgres.residency.pins import pin_owners
from headrace_registry.postgres.residency.transitions import move
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.residency import ResidencyState

# Also what a silent node would bring back.
RESIDENCIES_OF_MODEL_TO_END = """
SELECT id, state FROM residencies
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND (state NOT IN ('UNLOADED', 'FAILED', 'LOST') OR state_when_lost IS NOT NULL)
ORDER BY node_id, device_id, id FOR UPDATE
"""
HOLDERS_OF_MODEL = """
SELECT l.holder FROM leases l JOIN residencies r ON r.id = l.residency_id
WHERE r.model_id = %(model_id)s AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
  AND l.state = 'HELD' AND l.expire_time > registry_now()
ORDER BY l.grant_time LIMIT 20
"""
LEASES_TAKE = """
UPDATE leases SET state = 'LOST', end_time = registry_now(), end_reason = %(reason)s
WHERE residency_id = ANY(%(residency_ids)s) AND state = 'HELD'
"""


_S = ResidencyState


async def order_unload(
    conn: Connection, model_id: str, *, node_id: str, force: bool, actor: str, why: str
) -> list[str]:
    """Ends what is queued and unloads what holds memory; returns the ids concerned. The caller settles the nodes.

    What a silent node held is given up: the node drops it once it is heard again, which may be never. Raises
    ModelInUse while leased or pinned. With `force` the leases are lost, and pins do not keep it.
    """
    await lock_place(conn, node_id)
    place = {"model_id": model_id, "node_id": node_id}
    rows = await (await conn.execute(RESIDENCIES_OF_MODEL_TO_END, place)).fetchall()
    if rows and not force:
        await _check_free(conn, model_id, node_id)
    ids = [row["id"] for row in rows]
    await conn.execute(LEASES_TAKE, {"residency_ids": ids, "reason": f"{why} by {actor}"})
    for row in rows:
        await _send_off_one(conn, row["id"], _S(row["state"]), reason=why, actor=actor)
        await conn.execute(statements.WAITERS_STANDING_END, {"residency_id": row["id"]})
    return ids


async def _send_off_one(conn: Connection, residency_id: str, state: ResidencyState, *, reason: str, actor: str) -> None:
    if state in (_S.QUEUED, _S.LOST):
        ended = _S.UNLOADED if state is _S.QUEUED else _S.LOST
        await move(conn, residency_id, ended, reason=reason, actor=actor)
        return
    if state is _S.RESIDENT:
        await move(conn, residency_id, _S.DRAINING, reason=reason, actor=actor)
    if state is not _S.UNLOADING:  # Nobody holds it any more: what drains is drained.
        await move(conn, residency_id, _S.UNLOADING, reason=reason, actor=actor)


async def _check_free(conn: Connection, model_id: str, node_id: str) -> None:
    use = await use_of(conn, model_id, node_id)
    if use.words:
        raise ModelInUse(
            f"model {model_id!r} is {use.words}; wait for them, or unload with force",
            metadata=use.metadata,
            resource=("model", model_id),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Who relies on a model, 20 of each at most."""

    holders: tuple[str, ...]
    pin_owners: tuple[str, ...]

    @property
    def words(self) -> str:
        """Such as `leased by anna and pinned by bert`; empty if nobody does."""
        leased = [f"leased by {', '.join(name or 'someone' for name in self.holders)}"] if self.holders else []
        pinned = [f"pinned by {', '.join(self.pin_owners)}"] if self.pin_owners else []
        return " and ".join(leased + pinned)

    @property
    def metadata(self) -> dict[str, str]:
        """For the error that refuses because of it."""
        return {"holders": ", ".join(self.holders), "pin_owners": ", ".join(self.pin_owners)}


async def use_of(conn: Connection, model_id: str, node_id: str) -> Use:
    """Reads who holds leases on the model, or pins it; on the node, or with an empty one anywhere."""
    place = {"model_id": model_id, "node_id": node_id}
    holders = await (await conn.execute(HOLDERS_OF_MODEL, place)).fetchall()
    owners = await pin_owners(conn, model_id, node_id)
    return Use(holders=tuple(row["holder"] for row in holders), pin_owners=tuple(owners))
