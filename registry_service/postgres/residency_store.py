"""Residencies in Postgres: reads under the devices' locks, calls the decision, writes it with reason and actor.

Every decision about a device's memory holds that device's row FOR UPDATE, so reserving, choosing victims and granting
are one step. Locks are taken in the order model, node, device, residency.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from registry_service.errors import LeaseLost, ModelInUse
from registry_service.leases import Lease
from registry_service.models import Failure, Transfer
from registry_service.paging import Page
from registry_service.placement import load_error
from registry_service.postgres import queries
from registry_service.postgres.admit import Wish, admit
from registry_service.postgres.lease_store import grant_lease, lease_of_request
from registry_service.postgres.model_store import read_model
from registry_service.postgres.node_store import hear
from registry_service.postgres.pool import Connection, Database
from registry_service.postgres.requests import Request, recall, remember
from registry_service.postgres.residency_moves import end_abandoned, lock_device, move, promote, read_residency
from registry_service.postgres.rows import json_of, residency_of
from registry_service.residency import Residency, ResidencyState, follow_report
from registry_service.wakeups import Wakeups

T = TypeVar("T")

# A call that waits renews itself at each poll; one that dies is forgotten after this.
_WAITER_TTL_S = 10.0
# LoadModel answers at once; nobody renews its place in the queue, so it is kept for as long as AcquireLease waits.
_LOAD_WAITER_TTL_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """What to grant once the model is resident."""

    holder: str
    ttl_s: float
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """How a wish stands: a lease, or the residency it waits for and its place in the queue (0 once loading)."""

    residency: Residency
    position: int = 0
    lease: Lease | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyReport:
    """A node's word on one of its residencies."""

    node_id: str
    epoch: int
    residency_id: str
    fence: int
    state: ResidencyState
    transfer: Transfer | None = None
    measured_bytes: int = 0
    failure: Failure | None = None


class ResidencyStore:
    """What ResidencyService and ReportResidency need of the tables."""

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups

    async def load(self, wish: Wish, request: Request) -> Residency:
        """Makes the model resident or sees to it that it will be; idempotent."""

        async def work(conn: Connection) -> Residency:
            answered = await recall(conn, request)
            if answered is not None:
                known = await (await conn.execute(queries.RESIDENCY_READ, {"id": answered})).fetchone()
                if known is not None:
                    return residency_of(known)
            residency = await admit(conn, wish)
            if residency.state is ResidencyState.QUEUED:
                await _wait(conn, f"load-{residency.id}", residency.id, _LOAD_WAITER_TTL_S)
            if answered is None:
                await remember(conn, request, residency.id)
            return residency

        return await self._change(work)

    async def step(self, wish: Wish, terms: LeaseTerms, waiter_id: str, *, awaited: str = "") -> Admission:
        """One step of AcquireLease: admits, grants, or renews the waiter's place. Repeat it until there is a lease.

        `awaited` is the residency of the step before; if it has FAILED meanwhile, its error is raised and nothing else
        happens.
        """

        async def work(conn: Connection) -> Admission:
            known = await lease_of_request(conn, terms.request_id, wish.model_id)
            if known is not None:
                return Admission(residency=await read_residency(conn, known.residency_id), lease=known)
            residency = await admit(conn, wish)
            if awaited and awaited != residency.id:
                await _check_load(conn, awaited)
            if residency.state is ResidencyState.RESIDENT:
                lease = await grant_lease(
                    conn,
                    residency.id,
                    lease_id=waiter_id,
                    holder=terms.holder,
                    ttl_s=terms.ttl_s,
                    request_id=terms.request_id,
                )
                await conn.execute(queries.WAITER_DELETE, {"id": waiter_id})
                return Admission(residency=residency, lease=lease)
            await _wait(conn, waiter_id, residency.id, _WAITER_TTL_S)
            return Admission(residency=residency, position=await _position(conn, residency))

        return await self._change(work)

    async def abandon(self, waiter_id: str) -> None:
        """Forgets a waiter and its lease; a queued residency nobody else waits for ends with it."""

        async def work(conn: Connection) -> None:
            await conn.execute(queries.LEASE_TAKE_BACK, {"id": waiter_id})
            row = await (await conn.execute(queries.WAITER_DELETE, {"id": waiter_id})).fetchone()
            if row is None:
                return
            residency = await (await conn.execute(queries.RESIDENCY_READ, {"id": row["residency_id"]})).fetchone()
            if residency is not None and residency["state"] == ResidencyState.QUEUED:
                await lock_device(conn, residency["node_id"], residency["device_id"])
                await end_abandoned(conn, residency["node_id"], residency["device_id"])

        await self._change(work)

    async def unload(
        self, model_id: str, *, node_id: str, force: bool, actor: str, request: Request
    ) -> list[Residency]:
        """Sends the model off its devices. Raises ModelInUse while leased, unless forced."""

        async def work(conn: Connection) -> list[Residency]:
            await read_model(conn, model_id)
            answered = await recall(conn, request)
            if answered is not None:
                return [await read_residency(conn, each) for each in answered.split(",") if each]
            ids = await _unload(conn, model_id, node_id=node_id, force=force, actor=actor)
            await remember(conn, request, ",".join(ids))
            return [await read_residency(conn, each) for each in ids]

        return await self._change(work)

    async def report(self, report: ResidencyReport) -> None:
        """Follows a node's report. Raises EpochStale; LeaseLost where it answers an assignment long over."""

        async def work(conn: Connection) -> bool:
            await hear(conn, report.node_id, report.epoch)
            row = await (await conn.execute(queries.RESIDENCY_READ, {"id": report.residency_id})).fetchone()
            if row is None or row["node_id"] != report.node_id or row["node_epoch"] != report.epoch:
                raise LeaseLost(
                    f"residency {report.residency_id!r} is not of this node and epoch; drop it",
                    resource=("residency", report.residency_id),
                )
            await lock_device(conn, row["node_id"], row["device_id"])
            return await _follow(conn, report)

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
            rows = await (await conn.execute(queries.RESIDENCIES_LIST, parameters)).fetchall()
            return [residency_of(row) for row in rows]

        found = await self._database.run(work)
        more = len(found) > page.size
        found = found[: page.size]
        token = page.token_after((found[-1].create_time.isoformat(), found[-1].id)) if more else ""
        return found, token

    async def tidy(self) -> None:
        """Ends what nobody waits for and promotes the queues; any replica may, any time."""

        async def work(conn: Connection) -> bool:
            await conn.execute(queries.WAITERS_EXPIRE)
            rows = await (await conn.execute(queries.DEVICES_WITH_QUEUE)).fetchall()
            changed = False
            for row in rows:
                await lock_device(conn, row["node_id"], row["device_id"])
                changed |= await end_abandoned(conn, row["node_id"], row["device_id"])
                changed |= await promote(conn, row["node_id"], row["device_id"])
            return changed

        if await self._database.run(work):
            self._wakeups.wake()

    async def _change(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        result = await self._database.run(work)
        self._wakeups.wake()
        return result


async def _check_load(conn: Connection, residency_id: str) -> None:
    """Raises the load's error if it has FAILED. The device is locked: what has ended stays ended."""
    row = await (await conn.execute(queries.RESIDENCY_READ, {"id": residency_id})).fetchone()
    if row is not None and row["state"] == ResidencyState.FAILED:
        raise load_error(residency_of(row))


async def _unload(conn: Connection, model_id: str, *, node_id: str, force: bool, actor: str) -> list[str]:
    await conn.execute(queries.DEVICES_LOCK, {"node_id": node_id, "device_id": ""})
    parameters = {"model_id": model_id, "node_id": node_id}
    rows = await (await conn.execute(queries.RESIDENCIES_ACTIVE_OF_MODEL, parameters)).fetchall()
    holders = [row["holder"] for row in await (await conn.execute(queries.HOLDERS_OF_MODEL, parameters)).fetchall()]
    if holders and not force:
        raise ModelInUse(
            f"model {model_id!r} is leased by {', '.join(holders)}; wait for them, or unload with force",
            metadata={"holders": ", ".join(holders)},
            resource=("model", model_id),
        )
    await conn.execute(queries.LEASES_END, {"residency_ids": [row["id"] for row in rows]})
    for row in rows:
        if row["state"] == ResidencyState.QUEUED:
            await move(conn, row["id"], ResidencyState.UNLOADED, reason="unload asked for", actor=actor)
        elif row["state"] != ResidencyState.UNLOADING:
            await move(
                conn, row["id"], ResidencyState.UNLOADING, reason="unload asked for", actor=actor, new_fence=True
            )
    return [row["id"] for row in rows]


async def _follow(conn: Connection, report: ResidencyReport) -> bool:
    """Returns True if others should look again."""
    row = await (await conn.execute(queries.RESIDENCY_LOCK, {"id": report.residency_id})).fetchone()
    assert row is not None
    current = ResidencyState(row["state"])
    # That the memory is back is true whichever assignment the report answers; everything else needs the fence.
    ends = report.state in (ResidencyState.UNLOADED, ResidencyState.FAILED)
    followed = follow_report(current, report.state)
    if followed is None or (report.fence != row["fence"] and not ends):
        raise LeaseLost(
            f"fence {report.fence} of residency {report.residency_id!r} is stale; follow the latest assignments",
            metadata={"fence": str(report.fence), "current_fence": str(row["fence"])},
            resource=("residency", report.residency_id),
        )
    if report.failure is not None and followed.ended and not current.ended:
        await conn.execute(queries.RESIDENCY_FAILURE, {"id": row["id"], "failure": json_of(report.failure)})
    if report.state is ResidencyState.LOADING and current is ResidencyState.LOADING:
        await conn.execute(queries.RESIDENCY_PROGRESS, {"id": row["id"], "transfer": json_of(report.transfer)})
        return True
    if followed is current:
        return False
    await _enter(conn, report, followed)
    await promote(conn, row["node_id"], row["device_id"])
    return True


async def _enter(conn: Connection, report: ResidencyReport, state: ResidencyState) -> None:
    actor = f"node {report.node_id}"
    if state is ResidencyState.RESIDENT:
        values = {"id": report.residency_id, "measured_bytes": max(0, report.measured_bytes)}
        await conn.execute(queries.RESIDENCY_MEASURED, values)
        await conn.execute(queries.RESIDENCY_USED, {"id": report.residency_id})
    if state.ended:
        await conn.execute(queries.LEASES_END, {"residency_ids": [report.residency_id]})
    reason = report.failure.message if report.failure is not None else f"reported {report.state.lower()}"
    await move(conn, report.residency_id, state, reason=reason, actor=actor)


async def _wait(conn: Connection, waiter_id: str, residency_id: str, ttl_s: float) -> None:
    await conn.execute(queries.WAITER_UPSERT, {"id": waiter_id, "residency_id": residency_id, "ttl_s": ttl_s})


async def _position(conn: Connection, residency: Residency) -> int:
    if residency.state is not ResidencyState.QUEUED:
        return 0
    place = {"node_id": residency.node_id, "device_id": residency.device_id}
    queued = await (await conn.execute(queries.QUEUE, place)).fetchall()
    return [row["id"] for row in queued].index(residency.id) + 1
