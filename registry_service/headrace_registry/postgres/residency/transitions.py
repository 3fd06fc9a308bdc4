"""Transitions of residencies, each stored with reason, actor and event.

`carry_out_plan` is the only function that loads from the queues and evicts. The caller holds the locks of the node's
devices.
"""

from __future__ import annotations

from headrace_registry.errors import LeaseLost
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.node_views import lock_nodes, read_nodes
from headrace_registry.postgres.rows import residency_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Residency, ResidencyState
from headrace_registry.residency.scheduling import Plan, plan

# A move into the same state, which only gives a new reason or fence, does not make its age begin anew.
RESIDENCY_MOVE = """
UPDATE residencies
SET state_time = CASE WHEN state = %(state)s THEN state_time ELSE registry_now() END,
    state = %(state)s, reason = %(reason)s, actor = %(actor)s, update_time = registry_now(),
    fence = CASE WHEN %(new_fence)s THEN nextval('residency_fences') ELSE fence END,
    load_begin_time = CASE WHEN %(state)s::text = 'LOADING' AND state <> 'LOADING' THEN registry_now()
                           ELSE load_begin_time END,
    resident_time = CASE WHEN %(state)s::text = 'RESIDENT' AND state = 'LOADING' THEN registry_now()
                         ELSE resident_time END,
    state_when_lost = NULL
WHERE id = %(id)s
"""
NODE_IS_AWAITED = """
SELECT EXISTS (SELECT 1 FROM residencies WHERE node_id = %(node_id)s AND state IN ('QUEUED', 'DRAINING')) AS awaited
"""

# With these states a node gets a new assignment, and reports under its fence: it has to load or to end something.
_NEEDS_NEW_FENCE = (ResidencyState.LOADING, ResidencyState.UNLOADING)


async def carry_out_plan(conn: Connection, due: Plan) -> bool:
    """Loads, drains, evicts and ends residencies as planned. Returns True if the plan had any step.

    The caller read the node and planned in this transaction, so that the plan is of now.
    """
    for step in due.steps:
        await move(conn, step.residency_id, step.state, reason=step.reason, actor=step.actor)
        if step.state.ended:
            await conn.execute(statements.WAITERS_STANDING_END, {"residency_id": step.residency_id})
    return bool(due.steps)


async def plan_and_carry_out(conn: Connection, node_id: str, policy: Policy) -> bool:
    """Reads a node, plans it and carries the plan out. Returns True if anything changed; False also if it is silent."""
    nodes = await read_nodes(conn, (node_id,))
    return node_id in nodes and await carry_out_plan(conn, plan(nodes[node_id].view, policy))


async def plan_and_carry_out_if_awaited(database: Database, node_id: str, policy: Policy) -> bool:
    """Plans a node with queued or draining residencies; any other can wait for the next round of upkeep.

    Call it after the commit of a change that may make a transition due. Returns True if anything changed.
    """

    async def is_awaited(conn: Connection) -> bool:
        row = await (await conn.execute(NODE_IS_AWAITED, {"node_id": node_id})).fetchone()
        return row is not None and bool(row["awaited"])

    async def work(conn: Connection) -> bool:
        await lock_nodes(conn, (node_id,))
        return await plan_and_carry_out(conn, node_id, policy)

    return await database.single(is_awaited) and await database.run(work)


async def move(
    conn: Connection,
    residency_id: str,
    state: ResidencyState,
    *,
    reason: str,
    actor: str,
) -> None:
    """Stores one transition and its event."""
    new_fence = state in _NEEDS_NEW_FENCE
    values = {"id": residency_id, "state": state, "reason": reason, "actor": actor, "new_fence": new_fence}
    await conn.execute(RESIDENCY_MOVE, values)
    await conn.execute(statements.RESIDENCY_EVENTS, {"ids": [residency_id]})


async def read_residency(conn: Connection, residency_id: str) -> Residency:
    """Raises LeaseLost if the residency was purged."""
    row = await (await conn.execute(statements.RESIDENCY_READ, {"id": residency_id})).fetchone()
    if row is None:
        raise LeaseLost(f"residency {residency_id!r} is not kept any more", resource=("residency", residency_id))
    return residency_of(row)
