"""Nodes as decisions see them, read under the locks of all their devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace_registry.postgres.residency import statements as queries
from headrace_registry.postgres.rows import occupant_of
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.leases import MAX_S
from headrace_registry.residency.nodes import DeviceKind
from headrace_registry.residency.scheduling import DeviceView, NodeView


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
    await conn.execute(queries.DEVICES_OF_NODES_LOCK, parameters)
    await conn.execute(queries.RESIDENCIES_OF_NODES_LOCK, parameters)


async def lock_place(conn: Connection, node_id: str) -> None:
    """Like `lock_nodes`, for one node, or with an empty id for all."""
    rows = await (await conn.execute(queries.NODES_OF_PLACE, {"node_id": node_id, "device_id": ""})).fetchall()
    await lock_nodes(conn, [row["node_id"] for row in rows])


async def read_nodes(conn: Connection, node_ids: Sequence[str]) -> dict[str, LockedNode]:
    """Reads those of the nodes that live. The caller has locked them."""
    parameters = {"node_ids": sorted(node_ids)}
    living = await (await conn.execute(queries.LIVING_NODES, parameters)).fetchall()
    devices = await (await conn.execute(queries.DEVICES_OF_NODES_LOCK, parameters)).fetchall()
    occupants = await (await conn.execute(queries.OCCUPANTS_OF_NODES, {**parameters, "for_good_s": MAX_S})).fetchall()
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
