"""Unloads a model from its devices on an operator's order.

The devices are locked here; the caller may hold the model's row, which comes before them in the order of locks.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace_registry.errors import ModelInUse
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.node_views import lock_one_or_all
from headrace_registry.postgres.residency.pins import pin_owners
from headrace_registry.postgres.residency.transitions import move
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.residency import ResidencyState

# Residencies that a silent node would bring back are among them.
RESIDENCIES_OF_MODEL_TO_END = """
SELECT id, state FROM residencies
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND (state NOT IN ('UNLOADED', 'FAILED', 'LOST') OR state_when_lost IS NOT NULL)
ORDER BY id FOR UPDATE
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
# The transitions by which each state ends. RESIDENT passes through DRAINING only for the record: its leases are lost
# already. LOST to LOST gives the residency up, so that its node does not bring it back.
_WAY_OUT = {
    _S.QUEUED: (_S.UNLOADED,),
    _S.LOADING: (_S.UNLOADING,),
    _S.RESIDENT: (_S.DRAINING, _S.UNLOADING),
    _S.DRAINING: (_S.UNLOADING,),
    _S.UNLOADING: (),
    _S.LOST: (_S.LOST,),
}


async def order_unload(
    conn: Connection, model_id: str, *, node_id: str, force: bool, actor: str, why: str
) -> list[str]:
    """Ends the model's queued residencies and unloads the others; returns their ids. The caller plans the nodes anew.

    Residencies on a silent node are given up: the node drops them once it is heard again, which may be never. Raises
    ModelInUse while leased or pinned. With `force` the leases are lost, and pins do not keep the model.
    """
    await lock_one_or_all(conn, node_id)
    place = {"model_id": model_id, "node_id": node_id}
    rows = await (await conn.execute(RESIDENCIES_OF_MODEL_TO_END, place)).fetchall()
    if rows and not force:
        use = await use_of(conn, model_id, node_id)
        if use.words:
            raise ModelInUse(
                f"model {model_id!r} is {use.words}; wait for them, or unload with force",
                metadata=use.metadata,
                resource=("model", model_id),
            )
    ids = [row["id"] for row in rows]
    await conn.execute(LEASES_TAKE, {"residency_ids": ids, "reason": f"{why} by {actor}"})
    for row in rows:
        for state in _WAY_OUT[_S(row["state"])]:
            await move(conn, row["id"], state, reason=why, actor=actor)
        await conn.execute(statements.WAITERS_STANDING_END, {"residency_id": row["id"]})
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """The holders of leases on a model and the owners of its pins, 20 of each at most."""

    holders: tuple[str, ...]
    pin_owners: tuple[str, ...]

    @property
    def words(self) -> str:
        """Such as `leased by anna and pinned by bert`; empty without leases and pins."""
        leased = [f"leased by {', '.join(name or 'someone' for name in self.holders)}"] if self.holders else []
        pinned = [f"pinned by {', '.join(self.pin_owners)}"] if self.pin_owners else []
        return " and ".join(leased + pinned)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of an error that refuses because of this use."""
        return {"holders": ", ".join(self.holders), "pin_owners": ", ".join(self.pin_owners)}


async def use_of(conn: Connection, model_id: str, node_id: str) -> Use:
    """Reads leases and pins of the model, on the node or with an empty id on any."""
    place = {"model_id": model_id, "node_id": node_id}
    holders = await (await conn.execute(HOLDERS_OF_MODEL, place)).fetchall()
    owners = await pin_owners(conn, model_id, node_id)
    return Use(holders=tuple(row["holder"] for row in holders), pin_owners=tuple(owners))
