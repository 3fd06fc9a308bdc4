"""Transitions of residencies, each with reason, actor and event; the caller holds the device's row."""

from __future__ import annotations

from registry_service.errors import LeaseLost
from registry_service.postgres import queries
from registry_service.postgres.pool import Connection
from registry_service.postgres.rows import residency_of
from registry_service.residency import Residency, ResidencyState, next_to_load


async def move(
    conn: Connection,
    residency_id: str,
    state: ResidencyState,
    *,
    reason: str,
    actor: str,
    new_fence: bool = False,
) -> None:
    """One transition: state, reason, actor and its event."""
    values = {"id": residency_id, "state": state, "reason": reason, "actor": actor, "new_fence": new_fence}
    await conn.execute(queries.RESIDENCY_MOVE, values)
    await conn.execute(queries.RESIDENCY_EVENT, {"id": residency_id})


async def promote(conn: Connection, node_id: str, device_id: str) -> bool:
    """Starts loading what waits and fits now. The device's row is locked."""
    place = {"node_id": node_id, "device_id": device_id}
    queued = await (await conn.execute(queries.QUEUE, place)).fetchall()
    if not queued:
        return False
    room = await (await conn.execute(queries.DEVICE_ROOM, place)).fetchone()
    assert room is not None
    chosen = next_to_load([(row["id"], row["reserved_bytes"]) for row in queued], room["free_bytes"])
    for residency_id in chosen:
        await move(
            conn,
            residency_id,
            ResidencyState.LOADING,
            reason="memory is there",
            actor="registry",
            new_fence=True,
        )
    return bool(chosen)


async def end_abandoned(conn: Connection, node_id: str, device_id: str) -> bool:
    """Ends what is queued and nobody waits for; returns True if there was something."""
    place = {"node_id": node_id, "device_id": device_id}
    rows = await (await conn.execute(queries.QUEUE_ABANDONED, place)).fetchall()
    for row in rows:
        await move(conn, row["id"], ResidencyState.UNLOADED, reason="nobody waits any more", actor="registry")
    return bool(rows)


async def lock_device(conn: Connection, node_id: str, device_id: str) -> None:
    """Keeps everything about the device's memory until the transaction ends."""
    await conn.execute(queries.DEVICE_LOCK, {"node_id": node_id, "id": device_id})


async def read_residency(conn: Connection, residency_id: str) -> Residency:
    """Raises LeaseLost if it is not kept any more."""
    row = await (await conn.execute(queries.RESIDENCY_READ, {"id": residency_id})).fetchone()
    if row is None:
        raise LeaseLost(f"residency {residency_id!r} is not kept any more", resource=("residency", residency_id))
    return residency_of(row)
