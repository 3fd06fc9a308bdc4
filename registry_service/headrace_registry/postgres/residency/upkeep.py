"""Changes that time alone brings to residencies. Any replica may make them, at any time.

Queues move on, idle models are unloaded, waiters expire, and nodes that report nothing about a load are asked again.
"""

from __future__ import annotations

import logging
from typing import Any

from headrace_chassis.errors import ServiceError
from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.models.allowances import NOTHING_ALLOWED, Allowances
from headrace_registry.models.models import Failure
from headrace_registry.postgres import statements
from headrace_registry.postgres.models.validations import note_load
from headrace_registry.postgres.residency.failure_memory import note_failure
from headrace_registry.postgres.residency.node_views import lock_nodes
from headrace_registry.postgres.residency.placing import place
from headrace_registry.postgres.residency.transitions import move, plan_and_carry_out
from headrace_registry.postgres.rows import json_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.residency import ResidencyReport, ResidencyState
from headrace_registry.residency.wishes import Wish
from headrace_registry.wakeups import Wakeups

# Living nodes where a transition may be due by now.
NODES_DUE = """
SELECT DISTINCT r.node_id FROM residencies r JOIN nodes n ON n.id = r.node_id
WHERE n.state = 'ALIVE' AND (
    r.state IN ('QUEUED', 'DRAINING')
    OR (r.state = 'RESIDENT' AND %(idle_timeout_s)s > 0
        AND GREATEST(r.last_used_time, r.state_time) <= registry_now() - make_interval(secs => %(idle_timeout_s)s))
)
ORDER BY r.node_id
"""
RESIDENCIES_SILENT = """
SELECT r.id, r.node_id, r.device_id, r.model_id, r.state,
       extract(epoch FROM registry_now() - r.state_time)::float8 AS age_s
FROM residencies r JOIN nodes n ON n.id = r.node_id
WHERE n.state = 'ALIVE' AND (%(node_id)s = '' OR r.node_id = %(node_id)s) AND (
    (r.state = 'LOADING' AND r.update_time <= registry_now() - make_interval(secs => %(load_silence_s)s))
    OR (r.state = 'LOADING' AND r.state_time <= registry_now() - make_interval(secs => %(load_deadline_s)s))
    OR (r.state = 'UNLOADING' AND r.update_time <= registry_now() - make_interval(secs => %(unload_silence_s)s)))
ORDER BY r.node_id, r.id
"""
WAITERS_STANDING = """
SELECT w.id, w.node_id, w.device_id, w.actor, r.model_id, r.id AS residency_id
FROM waiters w JOIN residencies r ON r.id = w.residency_id
WHERE w.standing AND (r.state = 'QUEUED' OR (r.state = 'FAILED' AND r.failure IS NULL))
  AND w.expire_time > registry_now()
ORDER BY r.queue_seq, w.id
"""
WAITER_MOVE = "UPDATE waiters SET residency_id = %(residency_id)s WHERE id = %(id)s"
WAITERS_EXPIRE = "DELETE FROM waiters WHERE expire_time <= registry_now()"

log = logging.getLogger(__name__)

# Most waiters of LoadModel placed anew in one round, which so stays short; rounds take turns through all of them.
_MAX_STANDING = 64


class ResidencyUpkeep:
    """The upkeep of residencies, each node in a transaction of its own."""

    def __init__(
        self, database: Database, wakeups: Wakeups, policy: Policy, allowances: Allowances = NOTHING_ALLOWED
    ) -> None:
        self._database = database
        self._wakeups = wakeups
        self._policy = policy
        self._allowances = allowances
        self._last_standing = ""  # The waiter that was looked after last.

    async def tidy(self) -> None:
        """Does one round: makes the transitions that are due on every living node."""
        changed = False
        for row in await self._read(NODES_DUE, {"idle_timeout_s": self._policy.idle_timeout_s}):
            changed |= await self._plan_node(row["node_id"])
        for row in self._next_standing(await self._read(WAITERS_STANDING, {})):
            changed |= await self._place_again(row)
        silent = await self._read(RESIDENCIES_SILENT, self._silence(""))
        for node_id in sorted({row["node_id"] for row in silent}):
            changed |= await self._ask_again(node_id)
        await self._database.run(lambda conn: conn.execute(WAITERS_EXPIRE))
        if changed:
            self._wakeups.wake()

    def _next_standing(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the waiters of this round: those behind the last one of the round before, then from the front."""
        begin = next((place + 1 for place, row in enumerate(rows) if row["id"] == self._last_standing), 0)
        chosen = [*rows[begin:], *rows[:begin]][:_MAX_STANDING]
        self._last_standing = chosen[-1]["id"] if chosen else ""
        return chosen

    async def _plan_node(self, node_id: str) -> bool:
        async def work(conn: Connection) -> bool:
            await lock_nodes(conn, (node_id,))
            return await plan_and_carry_out(conn, node_id, self._policy)

        return await self._database.run(work)

    async def _place_again(self, row: dict[str, Any]) -> bool:
        """Places a LoadModel's model again, as no caller polls for it: it may fit elsewhere by now, or nowhere."""
        wish = Wish(model_id=row["model_id"], node_id=row["node_id"], device_id=row["device_id"], actor=row["actor"])

        async def work(conn: Connection) -> bool:
            residency = (await place(conn, wish, self._policy, self._allowances)).residency
            if residency.id == row["residency_id"]:
                return False
            await conn.execute(WAITER_MOVE, {"id": row["id"], "residency_id": residency.id})
            if residency.state is ResidencyState.RESIDENT:
                await conn.execute(statements.WAITER_DELETE, {"id": row["id"]})
            return True

        try:
            return await self._database.run(work)
        except DatabaseUnavailable:
            raise
        except ServiceError as exc:
            log.info("a load of %s is given up: %s", wish.model_id, exc.message)
            await self._database.run(lambda conn: conn.execute(statements.WAITER_DELETE, {"id": row["id"]}))
            return True

    async def _ask_again(self, node_id: str) -> bool:
        """Gives up loads past their deadline, and has the node follow its other overdue assignments anew."""
        policy = self._policy

        async def work(conn: Connection) -> bool:
            await lock_nodes(conn, (node_id,))
            rows = await (await conn.execute(RESIDENCIES_SILENT, self._silence(node_id))).fetchall()
            for row in rows:
                state = ResidencyState(row["state"])
                if state is ResidencyState.LOADING and row["age_s"] >= policy.load_deadline_s:
                    reason = f"loading took longer than {policy.load_deadline_s:g} s; look at the node's disk and log"
                    failure = Failure(reason="LOAD_FAILED", message=reason)
                    await conn.execute(statements.RESIDENCY_FAILURE, {"id": row["id"], "failure": json_of(failure)})
                    await note_failure(conn, row, failure, policy)
                    await note_load(conn, _given_up(row, failure), row["model_id"])
                    # The node may still hold a part of the model: its bytes count until the node reports the end.
                    state = ResidencyState.UNLOADING
                else:
                    limit_s = policy.load_silence_s if state is ResidencyState.LOADING else policy.unload_silence_s
                    reason = f"the node has not reported for {limit_s:g} s and is asked again"
                # A move into the same state gives the assignment a new fence, which the node follows anew.
                await move(conn, row["id"], state, reason=reason, actor="registry")
            return bool(rows)

        return await self._database.run(work)

    async def _read(self, statement: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        async def work(conn: Connection) -> list[dict[str, Any]]:
            return await (await conn.execute(statement, parameters)).fetchall()

        return await self._database.run(work)

    def _silence(self, node_id: str) -> dict[str, Any]:
        return {
            "node_id": node_id,
            "load_silence_s": self._policy.load_silence_s,
            "load_deadline_s": self._policy.load_deadline_s,
            "unload_silence_s": self._policy.unload_silence_s,
        }


def _given_up(row: dict[str, Any], failure: Failure) -> ResidencyReport:
    """Returns the report that the node has not sent."""
    return ResidencyReport(
        node_id=row["node_id"], epoch=0, residency_id=row["id"], fence=0, state=ResidencyState.FAILED, failure=failure
    )
