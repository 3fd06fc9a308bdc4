"""Residencies in Postgres: loads, unloads, the steps of AcquireLease, and the reports of nodes.

Every decision about a device's memory holds that device's row FOR UPDATE, so reserving, choosing victims and granting
are one step. Locks are taken in the order node, model, device, residency; a lease on a resident model is granted under
the residency's lock alone, in a transaction that takes no other.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from headrace_chassis.errors import ServiceError
from headrace_registry.errors import LeaseLost, LoadFailed
from headrace_registry.models.allowances import NOTHING_ALLOWED, Allowances
from headrace_registry.models.models import Failure
from headrace_registry.paging import Page
from headrace_registry.postgres import statements
from headrace_registry.postgres.models.models import read_model
from headrace_registry.postgres.models.validations import note_load
from headrace_registry.postgres.requests import Request, recall, remember
from headrace_registry.postgres.residency.evicting import order_eviction
from headrace_registry.postgres.residency.failure_memory import note_death, note_failure, note_success
from headrace_registry.postgres.residency.leases import grant_lease, grant_resident, lease_of_request
from headrace_registry.postgres.residency.node_views import lock_nodes
from headrace_registry.postgres.residency.nodes import hear
from headrace_registry.postgres.residency.pins import unmet_pins
from headrace_registry.postgres.residency.placing import place
from headrace_registry.postgres.residency.transitions import (
    move,
    plan_and_carry_out,
    plan_and_carry_out_if_awaited,
    read_residency,
)
from headrace_registry.postgres.residency.unloading import order_unload
from headrace_registry.postgres.residency.waiting import Waiter, wait_in_line
from headrace_registry.postgres.rows import json_of, occupant_of, residency_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.evictions import Eviction
from headrace_registry.residency.leases import Lease, LeaseTerms
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.refusals import holders_of, interrupted_error, load_error, same_everywhere
from headrace_registry.residency.residency import Residency, ResidencyReport, ResidencyState, follow_report
from headrace_registry.residency.wishes import DeviceKey, LeaseProgress, Placed, Wish
from headrace_registry.wakeups import Wakeups

RESIDENCIES_OF_IDS = statements.RESIDENCY_IN_FULL + "WHERE r.id = ANY(%(ids)s)"
RESIDENCIES_LIST = (
    statements.RESIDENCY_IN_FULL
    + """
WHERE (%(model_id)s = '' OR r.model_id = %(model_id)s) AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
  AND (%(include_ended)s OR r.state NOT IN ('UNLOADED', 'FAILED', 'LOST'))
  AND (%(after_time)s::timestamptz IS NULL OR (r.create_time, r.id) < (%(after_time)s::timestamptz, %(after_id)s))
ORDER BY r.create_time DESC, r.id DESC LIMIT %(limit)s
"""
)
RESIDENCIES_COUNT = """
SELECT count(*) AS n FROM residencies r
WHERE (%(model_id)s = '' OR r.model_id = %(model_id)s) AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
  AND (%(include_ended)s OR r.state NOT IN ('UNLOADED', 'FAILED', 'LOST'))
"""
RESIDENCY_LOCK = """
SELECT *, extract(epoch FROM registry_now() - state_time)::float8 AS age_s
FROM residencies WHERE id = %(id)s FOR UPDATE
"""
RESIDENCY_PROGRESS = """
UPDATE residencies SET transfer = %(transfer)s, update_time = registry_now() WHERE id = %(id)s
"""
RESIDENCY_MEASURED = """
UPDATE residencies
SET measured_bytes = %(measured_bytes)s, transfer = NULL,
    reserved_bytes = CASE WHEN %(measured_bytes)s > 0 THEN %(measured_bytes)s ELSE reserved_bytes END
WHERE id = %(id)s
"""
RESIDENCY_LOST_BYTES = """
UPDATE devices SET lost_bytes = lost_bytes + %(lost_bytes)s WHERE node_id = %(node_id)s AND id = %(device_id)s
"""
POSITION = """
SELECT count(*)::int AS position FROM residencies o JOIN residencies r
    ON r.node_id = o.node_id AND r.device_id = o.device_id
WHERE r.id = %(id)s AND r.state = 'QUEUED' AND o.state = 'QUEUED' AND o.queue_seq <= r.queue_seq
"""
LEASE_TAKE_BACK = """
UPDATE leases SET state = 'RELEASED', end_time = registry_now() WHERE id = %(id)s AND state = 'HELD'
RETURNING residency_id
"""

T = TypeVar("T")

log = logging.getLogger(__name__)

# Whatever ends a load so often, such as a guard of the machine's memory, goes on doing so.
_MAX_INTERRUPTED = 5


class ResidencyStore:
    """Reads and writes for ResidencyService and ReportResidency."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        policy: Policy | None = None,
        allowances: Allowances = NOTHING_ALLOWED,
    ) -> None:
        self._database = database
        self._wakeups = wakeups
        self._policy = policy or Policy()
        self._allowances = allowances

    async def load(self, wish: Wish, request: Request) -> Residency:
        """Starts or queues the load of the model where it is not loaded already; idempotent."""

        async def work(conn: Connection) -> Residency:
            answered = await recall(conn, request)
            if answered is not None:
                known = await (await conn.execute(statements.RESIDENCY_READ, {"id": answered})).fetchone()
                if known is not None:
                    return residency_of(known)
            residency = (await place(conn, wish, self._policy, self._allowances)).residency
            # A load at work has a standing waiter too: by it the load begins again if it is ended from outside.
            if residency.state in (ResidencyState.QUEUED, ResidencyState.LOADING):
                await wait_in_line(conn, Waiter.standing_for(residency.id, wish), residency.id, self._policy)
            if answered is None:
                await remember(conn, request, residency.id)
            return residency

        return await self._change(work)

    async def load_pinned(self, node_id: str) -> None:
        """Loads pinned models that are on no device, after a start of the node; a load that is refused is logged."""
        for pin in await self._database.run(lambda conn: unmet_pins(conn, node_id)):
            wish = Wish(model_id=pin.model_id, node_id=pin.node_id, actor=f"pin of {pin.owner}")
            try:
                await self.load(wish, Request(request_id="", method="LoadModel", arguments=()))
            except ServiceError as exc:
                log.info("pinned %s is not loaded: %s", pin.model_id, exc.message)

    async def step(
        self, wish: Wish, terms: LeaseTerms, waiter_id: str, *, last: LeaseProgress | None = None
    ) -> LeaseProgress:
        """Takes one step of AcquireLease: grants, or places the model and renews the waiter. Repeat it until granted.

        `last` is the result of the step before. If the residency it waited for has failed, the model is placed on a
        device where it has not, or the failure is raised.
        """

        async def grant(conn: Connection) -> Lease | None:
            # A call that is repeated after its answer got lost has its lease already.
            known = await lease_of_request(conn, terms.request_id, wish.model_id)
            return known or await grant_resident(conn, wish, terms, lease_id=waiter_id)

        async def work(conn: Connection) -> tuple[LeaseProgress, bool]:
            known = await lease_of_request(conn, terms.request_id, wish.model_id)
            if known is not None:  # Granted to a repeated call meanwhile.
                return LeaseProgress(lease=known), False
            placed, avoid, n_interrupted = await self._place(conn, wish, last)
            residency = placed.residency
            # It may have become resident between the attempt to grant and the locks that placing takes.
            if residency.state is ResidencyState.RESIDENT:
                lease = await grant_lease(conn, residency.id, terms, lease_id=waiter_id)
                await conn.execute(statements.WAITER_DELETE, {"id": waiter_id})
                return LeaseProgress(lease=lease), placed.changed
            await wait_in_line(conn, Waiter.calling(waiter_id, wish), residency.id, self._policy)
            row = await (await conn.execute(POSITION, {"id": residency.id})).fetchone()
            assert row is not None
            progress = LeaseProgress(
                residency=residency, position=row["position"], avoid=avoid, n_interrupted=n_interrupted
            )
            return progress, placed.changed

        # For a resident model one statement is enough, unless there is a request to remember.
        lease = await (self._database.run if terms.request_id else self._database.single)(grant)
        if lease is not None:
            if last is not None:
                await self._database.single(lambda conn: conn.execute(statements.WAITER_DELETE, {"id": waiter_id}))
            return LeaseProgress(lease=lease)
        answer, changed = await self._database.run(work)
        if changed:
            self._wakeups.wake()
        return answer

    async def _place(
        self, conn: Connection, wish: Wish, last: LeaseProgress | None
    ) -> tuple[Placed, Mapping[DeviceKey, Failure], int]:
        """Places the wish; returns the devices to avoid too, to which a load that failed since `last` adds its own.

        A load that was interrupted from outside begins again, a few times for each call; how often is returned last.
        """
        avoid = dict(last.avoid) if last is not None else {}
        n_interrupted = last.n_interrupted if last is not None else 0
        row = None
        if last is not None and last.residency is not None:
            row = await (await conn.execute(statements.RESIDENCY_READ, {"id": last.residency.id})).fetchone()
        if row is not None and row["state"] == ResidencyState.FAILED and row["failure"] is None:
            n_interrupted += 1
            if n_interrupted > _MAX_INTERRUPTED:
                raise interrupted_error(residency_of(row))
        # A load that the registry gave up is UNLOADING until its memory is back.
        over = (ResidencyState.FAILED, ResidencyState.UNLOADING)
        if row is None or row["failure"] is None or row["state"] not in over:
            return await place(conn, wish, self._policy, self._allowances, avoid), avoid, n_interrupted
        failed = residency_of(row)
        if same_everywhere(failed):
            raise load_error(failed)
        assert failed.failure is not None
        avoid[failed.node_id, failed.device_id] = failed.failure
        try:
            return await place(conn, wish, self._policy, self._allowances, avoid), avoid, n_interrupted
        except LoadFailed:  # Every other device is avoided too: the caller's own failure says more.
            raise load_error(failed) from None

    async def abandon(self, waiter_id: str) -> None:
        """Removes a waiter and its lease; a queued residency without another waiter ends with it."""

        async def work(conn: Connection) -> str:
            taken = await (await conn.execute(LEASE_TAKE_BACK, {"id": waiter_id})).fetchone()
            row = await (await conn.execute(statements.WAITER_DELETE, {"id": waiter_id})).fetchone()
            left = taken or row
            if left is None:
                return ""
            residency = await (await conn.execute(statements.RESIDENCY_READ, {"id": left["residency_id"]})).fetchone()
            return residency["node_id"] if residency is not None else ""

        node_id = await self._database.run(work)
        if node_id:
            await plan_and_carry_out_if_awaited(self._database, node_id, self._policy)
            self._wakeups.wake()

    async def memory_holders(self, residency_id: str) -> tuple[str, ...]:
        """Returns, for people, the holders of the memory that a queued residency waits for."""

        async def work(conn: Connection) -> tuple[str, ...]:
            wanted = await read_residency(conn, residency_id)
            parameters = {"node_ids": [wanted.node_id], "for_good_s": 0.0}
            rows = await (await conn.execute(statements.OCCUPANTS_OF_NODES, parameters)).fetchall()
            occupants = [occupant_of(row) for row in rows if row["device_id"] == wanted.device_id]
            return holders_of(o for o in occupants if o.state.holds_memory and o.residency_id != residency_id)

        return await self._database.run(work)

    async def unload(
        self, model_id: str, *, node_id: str, force: bool, actor: str, request: Request
    ) -> list[Residency]:
        """Unloads the model from its devices. Raises ModelInUse while it is leased or pinned, unless forced."""

        async def work(conn: Connection) -> list[Residency]:
            await read_model(conn, model_id)
            answered = await recall(conn, request)
            if answered is not None:
                return [await read_residency(conn, each) for each in answered.split(",") if each]
            ids = await order_unload(conn, model_id, node_id=node_id, force=force, actor=actor, why="unload asked for")
            for each in sorted({(await read_residency(conn, each)).node_id for each in ids}):
                await plan_and_carry_out(conn, each, self._policy)
            await remember(conn, request, ",".join(ids))
            return [await read_residency(conn, each) for each in ids]

        return await self._change(work)

    async def evict(
        self, wanted_bytes: int, *, node_id: str, device_id: str, actor: str
    ) -> tuple[Eviction, list[Residency]]:
        """Evicts idle models until so many bytes are free on a device, see `order_eviction`; so it is idempotent."""

        async def work(conn: Connection) -> tuple[Eviction, list[Residency]]:
            decided = await order_eviction(
                conn, wanted_bytes, node_id=node_id, device_id=device_id, actor=actor, policy=self._policy
            )
            return decided, [await read_residency(conn, each.residency_id) for each in decided.victims]

        return await self._change(work)

    async def report(self, report: ResidencyReport) -> None:
        """Follows a node's report. Raises EpochStale, and LeaseLost if the report answers an older assignment."""

        async def work(conn: Connection) -> bool:
            await hear(conn, report.node_id, report.epoch)
            row = await (await conn.execute(statements.RESIDENCY_READ, {"id": report.residency_id})).fetchone()
            if row is None or row["node_id"] != report.node_id or row["node_epoch"] != report.epoch:
                raise LeaseLost(
                    f"residency {report.residency_id!r} is not of this node and epoch; drop it",
                    resource=("residency", report.residency_id),
                )
            # Progress of a load changes no memory, so it needs no locks and makes no transition due.
            is_progress = report.state is ResidencyState.LOADING
            if not is_progress:
                await lock_nodes(conn, (report.node_id,))
            changed = await _follow(conn, report, self._policy)
            if changed and not is_progress:
                await plan_and_carry_out(conn, report.node_id, self._policy)
            return changed

        if await self._database.run(work):
            self._wakeups.wake()

    async def page(
        self, *, model_id: str, node_id: str, include_ended: bool, page: Page
    ) -> tuple[list[Residency], str]:
        """Returns one page, the newest first, and the token of the next."""

        async def work(conn: Connection) -> list[Residency]:
            after = page.after or ("", "")
            parameters = {
                "model_id": model_id,
                "node_id": node_id,
                "include_ended": include_ended,
                "after_time": page.time_after(),
                "after_id": after[1],
                "limit": page.size + 1,
            }
            rows = await (await conn.execute(RESIDENCIES_LIST, parameters)).fetchall()
            return [residency_of(row) for row in rows]

        return page.cut(await self._database.run(work), lambda each: (each.create_time.isoformat(), each.id))

    async def count(self, *, model_id: str, node_id: str, include_ended: bool) -> int:
        """Counts the residencies on all pages."""
        parameters = {"model_id": model_id, "node_id": node_id, "include_ended": include_ended}
        return await self._database.count(RESIDENCIES_COUNT, parameters)

    async def details(self, ids: Sequence[str]) -> dict[str, Residency]:
        """Reads residencies with queue position, pins and holders, by id; purged ones are missing."""

        async def work(conn: Connection) -> dict[str, Residency]:
            rows = await (await conn.execute(RESIDENCIES_OF_IDS, {"ids": list(ids)})).fetchall()
            return {row["id"]: residency_of(row) for row in rows}

        return await self._database.run(work)

    async def _change(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        result = await self._database.run(work)
        self._wakeups.wake()
        return result


async def _follow(conn: Connection, report: ResidencyReport, policy: Policy) -> bool:
    """Moves the residency as the node reports. Returns True if anything changed."""
    row = await (await conn.execute(RESIDENCY_LOCK, {"id": report.residency_id})).fetchone()
    assert row is not None
    current = ResidencyState(row["state"])
    # An end means that the memory is back, whichever assignment the report answers; all other reports need the fence.
    ends = report.state in (ResidencyState.UNLOADED, ResidencyState.FAILED)
    followed = follow_report(current, report.state, failed=row["failure"] is not None)
    if followed is None or (report.fence != row["fence"] and not ends):
        raise LeaseLost(
            f"fence {report.fence} of residency {report.residency_id!r} is stale; follow the latest assignments",
            metadata={"fence": str(report.fence), "current_fence": str(row["fence"])},
            resource=("residency", report.residency_id),
        )
    if report.state is ResidencyState.LOADING and current is ResidencyState.LOADING:
        await conn.execute(RESIDENCY_PROGRESS, {"id": row["id"], "transfer": json_of(report.transfer)})
        return True
    if followed is current:
        return False
    if followed.ended:
        await _note_end(conn, report, row, policy)
    else:
        values = {"id": report.residency_id, "measured_bytes": max(0, report.measured_bytes)}
        await conn.execute(RESIDENCY_MEASURED, values)
        await conn.execute(statements.RESIDENCY_USED, {"id": report.residency_id})
        await note_success(conn, row)
    if current is ResidencyState.LOADING and followed in (ResidencyState.RESIDENT, ResidencyState.FAILED):
        await note_load(conn, report, row["model_id"])
    # LoadModel keeps its place for a load that was ended from outside: upkeep begins it again.
    if not (current is ResidencyState.LOADING and report.failure is not None and report.failure.interrupted):
        await conn.execute(statements.WAITERS_STANDING_END, {"residency_id": row["id"]})
    reason = report.failure.message if report.failure is not None else f"reported {followed.lower()}"
    await move(conn, report.residency_id, followed, reason=reason, actor=f"node {report.node_id}")
    return True


async def _note_end(conn: Connection, report: ResidencyReport, row: dict[str, Any], policy: Policy) -> None:
    """Stores the consequences of an end: leases that are lost, memory not given back, a failure to remember."""
    await conn.execute(statements.LEASES_END, {"residency_ids": [report.residency_id]})
    if report.lost_bytes > 0:
        values = {"node_id": row["node_id"], "device_id": row["device_id"], "lost_bytes": report.lost_bytes}
        await conn.execute(RESIDENCY_LOST_BYTES, values)
    if report.failure is not None and report.failure.interrupted:
        return  # No fault of the model: nothing to remember, and calls that wait for it have it loaded again.
    if report.failure is not None:
        await conn.execute(statements.RESIDENCY_FAILURE, {"id": row["id"], "failure": json_of(report.failure)})
    failure = report.failure or Failure(reason="LOAD_FAILED", message="the node gave no reason; see its log")
    if report.state is ResidencyState.FAILED and row["state"] == ResidencyState.LOADING:
        await note_failure(conn, row, failure, policy)
    if report.state is ResidencyState.FAILED and row["state"] == ResidencyState.RESIDENT:
        await note_death(conn, row, failure, policy)
