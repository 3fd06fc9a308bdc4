"""Transitions of residencies, each with reason, actor and event; the caller holds the locks of the node's devices."""

from __future__ import annotations

from headrace_registry.errors import LeaseLost
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.node_views import lock_nodes, read_nodes
from headrace_registry.postgres.rows import residency_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import Residency, ResidencyState
from headrace_registry.residency.scheduling import Outcome, Step, plan

RESIDENCY_MOVE = """
UPDATE residencies
SET state_time = CASE WHEN state = %(state)s THEN state_time ELSE registry_now() END,
    state = %(state)s, reason = %(reason)s, actor = %(actor)s, update_time = registry_now(),
    fence = CASE WHEN %(new_fence)s THEN nextval('residency_fences') ELSE fence END,
    state_when_lost = NULL
WHERE id = %(id)s
"""
NODE_IS_AWAITED = """
SELECT EXISTS (SELECT 1 FROM residencies WHERE node_id = %(node_id)s AND state IN ('QUEUED', 'DRAINING')) AS awaited
"""


# A node follows an assignment anew, and reports under its fence, when it shall load or end something.
_ASSIGNED_ANEW = (ResidencyState.LOADING, ResidencyState.UNLOADING)

_WHY_QUEUED = {
    Outcome.WAIT: "waits for memory on its way back",
    Outcome.EVICT: "waits for what is evicted for it",
    Outcome.QUEUE: "waits for what others hold",
}


async def move(
    conn: Connection,
    residency_id: str,
    state: ResidencyState,
    *,
    reason: str,
    actor: str,
) -> None:
    """One transition: state, reason, actor and its event."""
    new_fence = state in _ASSIGNED_ANEW
    values = {"id": residency_id, "state": state, "reason": reason, "actor": actor, "new_fence": new_fence}
    await conn.execute(RESIDENCY_MOVE, values)
    await conn.execute(statements.RESIDENCY_EVENT, {"id": residency_id})


async def plan_and_carry_out(
    conn: Connection, node_id: str, policy: Policy, *, awaited: str = "", fresh: bool = False
) -> bool:
    """Does everything that is due on a node. Returns True if something changed.

    `awaited` has a waiter who is not in the tables yet; if `fresh`, it was made by this transaction.
    """
    found = await read_nodes(conn, (node_id,))
    if node_id not in found:
        return False
    due = plan(found[node_id].view, policy, awaited=awaited)
    for step in due.steps:
        await _take(conn, step, first=fresh and step.residency_id == awaited)
    outcome = due.outcomes.get(awaited)
    if fresh and outcome is not None and outcome is not Outcome.LOAD:
        state, why = ResidencyState.QUEUED, _WHY_QUEUED[outcome]
        actor = next(o.actor for o in found[node_id].view.occupants if o.residency_id == awaited)
        await move(conn, awaited, state, reason=why, actor=actor)
    return bool(due.steps)


async def plan_and_carry_out_if_awaited(database: Database, node_id: str, policy: Policy) -> bool:
    """Does what is due on a node where somebody waits for memory; elsewhere the next round of upkeep is soon enough.

    Call it after the commit of what may make it due. Returns True if anything changed.
    """

    async def look(conn: Connection) -> bool:
        row = await (await conn.execute(NODE_IS_AWAITED, {"node_id": node_id})).fetchone()
        return row is not None and bool(row["awaited"])

    async def work(conn: Connection) -> bool:
        await lock_nodes(conn, (node_id,))
        return await plan_and_carry_out(conn, node_id, policy)

    return await database.single(look) and await database.run(work)


async def read_residency(conn: Connection, residency_id: str) -> Residency:
    """Raises LeaseLost if it is not kept any more."""
    row = await (await conn.execute(statements.RESIDENCY_READ, {"id": residency_id})).fetchone()
    if row is None:
        raise LeaseLost(f"residency {residency_id!r} is not kept any more", resource=("residency", residency_id))
    return residency_of(row)


async def _take(conn: Connection, step: Step, *, first: bool) -> None:
    reason = "asked for" if first and step.state is ResidencyState.LOADING else step.reason
    await move(conn, step.residency_id, step.state, reason=reason, actor=step.actor)
    if step.state.ended:
        await conn.execute(statements.WAITERS_STANDING_END, {"residency_id": step.residency_id})
