"""Evicts idle models from a device on an operator's order, to have so many bytes free."""

from __future__ import annotations

from headrace_registry.errors import CapacityBusy, FieldInvalid, NodeLost, NodeNotFound
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.node_views import lock_nodes, read_nodes
from headrace_registry.postgres.residency.transitions import move, plan_and_carry_out
from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.evictions import Eviction, decide_eviction
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.refusals import holders_of
from headrace_registry.residency.residency import ResidencyState

_RETRY_AFTER_S = 5.0


async def order_eviction(
    conn: Connection, wanted_bytes: int, *, node_id: str, device_id: str, actor: str, policy: Policy
) -> Eviction:
    """Unloads the least recently used idle models of one device until `wanted_bytes` are free there.

    Raises NodeNotFound, NodeLost, FieldInvalid where no device has so many bytes, and CapacityBusy where models in use
    are in the way: then none is evicted.
    """
    allowed = {"node_id": node_id, "device_id": device_id}
    rows = await (await conn.execute(statements.NODES_WITH_DEVICE, allowed)).fetchall()
    if not rows:
        raise NodeNotFound("/".join(part for part in (node_id, device_id) if part))
    node_ids = [row["node_id"] for row in rows]
    await lock_nodes(conn, node_ids)
    nodes = await read_nodes(conn, node_ids)
    if not nodes:
        raise NodeLost("no node is alive; start an extractor", retry_after_s=2.0)
    decided = decide_eviction([node.view for node in nodes.values()], wanted_bytes, device_id=device_id)
    if decided is None:
        largest = max(device.capacity_bytes for node in nodes.values() for device in node.view.devices)
        raise FieldInvalid("free_bytes", f"{wanted_bytes} are more than any device has; the largest has {largest}")
    place = f"{decided.node_id}/{decided.device.id}"
    if not decided.is_enough:
        held = holders_of(decided.in_the_way) or ("a validation, or memory that unloads did not give back",)
        raise CapacityBusy(
            f"{place} can't have {wanted_bytes} bytes free, in the way: {', '.join(held)}; unload something there by "
            "name, or wait",
            metadata={"free_bytes": str(decided.free_bytes), "holders": ", ".join(held), "place": place},
            retry_after_s=_RETRY_AFTER_S,
        )
    for victim in decided.victims:
        await move(conn, victim.residency_id, ResidencyState.UNLOADING, reason="evicted to free memory", actor=actor)
    await plan_and_carry_out(conn, decided.node_id, policy)
    return decided
