"""Reads nodes as decisions see them, under the locks of all their devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_registry.postgres import statements
from headrace_registry.postgres.rows import occupant_of
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.leases import MAX_S
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.scheduling import DeviceView, NodeView

# All devices of a node at once, because its limits count over all of them. No join with `nodes`: after a wait for the
# lock Postgres reads the locked row anew, but not the joined one.
DEVICES_OF_NODES_LOCK = """
SELECT d.*, COALESCE((
    SELECT sum(a.reserved_bytes) FROM validation_attempts a
    WHERE a.node_id = d.node_id AND a.device_id = d.id AND a.held), 0)::bigint AS validating_bytes
FROM devices d WHERE d.node_id = ANY(%(node_ids)s) ORDER BY d.node_id, d.id FOR UPDATE OF d
"""
# Leases are granted under the residency's lock alone: after this no lease is granted until the transaction ends.
RESIDENCIES_OF_NODES_LOCK = """
SELECT id FROM residencies
WHERE node_id = ANY(%(node_ids)s) AND state NOT IN ('UNLOADED', 'FAILED', 'LOST') ORDER BY id FOR UPDATE
"""
LIVING_NODES = """
SELECT * FROM nodes WHERE id = ANY(%(node_ids)s) AND state = 'ALIVE' ORDER BY id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedNode:
    """A living node; this transaction has locked its devices."""

    view: NodeView
    epoch: int
    # Bytes an empty runner takes on this node; 0 while unknown.
    runtime_bytes: int = 0


async def lock_nodes(conn: Connection, node_ids: Sequence[str]) -> None:
    """Locks everything that uses these nodes' memory, and grants of leases on it, until the transaction ends."""
    parameters = {"node_ids": sorted(node_ids)}
    await conn.execute(DEVICES_OF_NODES_LOCK, parameters)
    await conn.execute(RESIDENCIES_OF_NODES_LOCK, parameters)


async def lock_one_or_all(conn: Connection, node_id: str) -> None:
    """Locks one node as `lock_nodes` does, or with an empty id all of them."""
    rows = await (await conn.execute(statements.NODES_WITH_DEVICE, {"node_id": node_id, "device_id": ""})).fetchall()
    await lock_nodes(conn, [row["node_id"] for row in rows])


async def read_nodes(conn: Connection, node_ids: Sequence[str]) -> dict[str, LockedNode]:
    """Reads the nodes, leaving out LOST ones. The caller has locked them all."""
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
                devices=tuple(
                    DeviceView(
                        id=device["id"],
                        kind=DeviceKind(device["kind"]),
                        capacity_bytes=device["capacity_bytes"],
                        # Bytes of validations count as lost too: no eviction gives them back.
                        lost_bytes=device["lost_bytes"] + device["validating_bytes"],
                    )
                    for device in devices
                    if device["node_id"] == row["id"] and device["present"]
                ),
                occupants=tuple(occupant_of(o) for o in occupants if o["node_id"] == row["id"]),
                max_loads=row["max_loads"],
                max_residents=row["max_residents"],
            ),
            epoch=row["epoch"],
            runtime_bytes=row.get("runtime_bytes", 0),
        )
        for row in living
    }
