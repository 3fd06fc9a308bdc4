"""Nodes as decisions see them, read under the locks of all their devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace_registry.postgres import statements
from headrace_registry.postgres.rows import occupant_of
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.leases import MAX_S
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.scheduling import DeviceView, NodeView

# All devices of a node at once: its limits count over all of them. No join with nodes here: after a wait for the lock,
# Postgres reads the locked row anew, but not the joined one.
DEVICES_OF_NODES_LOCK = """
SELECT d.*, COALESCE((
    SELECT sum(a.reserved_bytes) FROM validation_attempts a
    WHERE a.node_id = d.node_id AND a.device_id = d.id AND NOT a.done), 0)::bigint AS validating_bytes
FROM devices d WHERE d.node_id = ANY(%(node_ids)s) ORDER BY d.node_id, d.id FOR UPDATE OF d
"""
# Leases are granted under the residency's lock alone; what is read of them after this stays true.
RESIDENCIES_OF_NODES_LOCK = """
SELECT id FROM residencies
WHERE node_id = ANY(%(node_ids)s) AND state NOT IN ('UNLOADED', 'FAILED', 'LOST') ORDER BY id FOR UPDATE
"""
LIVING_NODES = """
SELECT * FROM nodes WHERE id = ANY(%(node_ids)s) AND state = 'ALIVE' ORDER BY id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedNode:
    """A living node whose devices this transaction has locked."""

    view: NodeView
    epoch: int
    # What an empty runner takes there; 0 while unknown.
    runtime_bytes: int = 0


async def lock_nodes(conn: Connection, node_ids: Sequence[str]) -> None:
    """Keeps everything about these nodes' memory until the transaction ends; leases on it too."""
    parameters = {"node_ids": sorted(node_ids)}
    await conn.execute(DEVICES_OF_NODES_LOCK, parameters)
    await conn.execute(RESIDENCIES_OF_NODES_LOCK, parameters)


async def lock_place(conn: Connection, node_id: str) -> None:
    """Like `lock_nodes`, for one node, or with an empty id for all."""
    rows = await (await conn.execute(statements.NODES_OF_PLACE, {"node_id": node_id, "device_id": ""})).fetchall()
    await lock_nodes(conn, [row["node_id"] for row in rows])


async def read_nodes(conn: Connection, node_ids: Sequence[str]) -> dict[str, LockedNode]:
    """Reads those of the nodes that live. The caller has locked them."""
    parameters = {"node_ids": sorted(node_ids)}
    living = await (await conn.execute(LIVING_NODES, parameters)).fetchall()
    devices = await (await conn.execute(DEVICES_OF_NODES_LOCK, parameters)).fetchall()
    occupants = await (
        await conn.execute(statements.OCCUPANTS_OF_NODES, {**parameters, "for_good_s": MAX_S})
    ).fetchall()
    return {
        row["id"]: LockedNode(
            view=NodeView(
                id=row["id"],
                devices=tuple(_device_of(d) for d in devices if d["node_id"] == row["id"] and d["present"]),
                occupants=tuple(occupant_of(o) for o in occupants if o["node_id"] == row["id"]),
                max_loads=row["max_loads"],
                max_residents=row["max_residents"],
            ),
            epoch=row["epoch"],
            runtime_bytes=row.get("runtime_bytes", 0),
        )
        for row in living
    }


def _device_of(row: dict[str, Any]) -> DeviceView:
    return DeviceView(
        id=row["id"],
        kind=DeviceKind(row["kind"]),
        capacity_bytes=row["capacity_bytes"],
        # Held by trials, too: nobody can be evicted for them.
        lost_bytes=row["lost_bytes"] + row["validating_bytes"],
    )
