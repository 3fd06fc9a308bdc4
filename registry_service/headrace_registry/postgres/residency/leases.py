"""Leases in Postgres: granted in the admission's transaction, renewed and ended by the database's clock."""

from __future__ import annotations

from typing import Any

from headrace_registry.errors import FieldInvalid, LeaseLost, LeaseNotFound
from headrace_registry.postgres import statements as queries
from headrace_registry.postgres.residency import statements as admission
from headrace_registry.postgres.residency.transitions import settle_if_awaited
from headrace_registry.postgres.rows import lease_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.leases import Lease, LeaseTerms
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.wishes import Wish
from headrace_registry.wakeups import Wakeups


class LeaseStore:
    """What RenewLease, ReleaseLease and the reaper need of the tables."""

    def __init__(self, database: Database, wakeups: Wakeups, policy: Policy | None = None) -> None:
        self._database = database
        self._wakeups = wakeups
        self._policy = policy or Policy()

    async def renew(self, lease_id: str, fence: int) -> Lease:
        """Extends a living lease by its time to live. Raises LeaseLost, LeaseNotFound."""

        async def work(conn: Connection) -> Lease:
            renewed = await (await conn.execute(queries.LEASE_RENEW, {"id": lease_id, "fence": fence})).fetchone()
            row = await (await conn.execute(queries.LEASE_READ, {"id": lease_id})).fetchone()
            if row is None:
                raise LeaseNotFound(lease_id)
            if renewed is None:
                why = f": {row['end_reason']}" if row["end_reason"] else ""
                raise LeaseLost(
                    f"lease {lease_id!r} has ended or fence {fence} is stale{why}; acquire a new one",
                    metadata={
                        "state": row["state"],
                        "residency_state": row["residency_state"],
                        "end_reason": row["end_reason"],
                    },
                    resource=("lease", lease_id),
                )
            return lease_of(row)

        return await self._database.run(work)

    async def release(self, lease_id: str, fence: int) -> None:
        """Ends a lease; one that has ended is no error. Raises LeaseLost if a living one has another fence."""

        async def work(conn: Connection) -> str:
            row = await (await conn.execute(queries.LEASE_READ, {"id": lease_id})).fetchone()
            if row is None or row["state"] != "HELD":
                return ""
            if row["fence"] != fence:
                raise LeaseLost(
                    f"fence {fence} is not that of lease {lease_id!r}; release with the fence it was granted with",
                    resource=("lease", lease_id),
                )
            # The residency first, as whoever ends it does.
            await conn.execute(queries.RESIDENCY_USED, {"id": row["residency_id"]})
            await conn.execute(queries.LEASE_RELEASE, {"id": lease_id, "fence": fence})
            return str(row["node_id"])

        node_id = await self._database.run(work)
        if node_id and await settle_if_awaited(self._database, node_id, self._policy):
            self._wakeups.wake()

    async def expire(self) -> int:
        """Ends the leases whose time is over; returns how many."""

        async def work(conn: Connection) -> int:
            row = await (await conn.execute(queries.LEASES_EXPIRE)).fetchone()
            assert row is not None
            return int(row["n"])

        n_expired = await self._database.run(work)
        if n_expired:
            self._wakeups.wake()
        return n_expired


async def grant_resident(conn: Connection, wish: Wish, terms: LeaseTerms, *, lease_id: str) -> Lease | None:
    """Grants at once if the model is resident where the wish allows it; takes no lock but the residency's.

    One statement, unless the terms name a request.
    """
    values = {"model_id": wish.model_id, "node_id": wish.node_id, "device_id": wish.device_id}
    if terms.request_id:
        await conn.execute(queries.LEASE_STALE_REQUEST, {"request_id": terms.request_id})
    granted = await conn.execute(admission.LEASE_GRANT_RESIDENT, {**values, **_terms(terms, lease_id)})
    row = await granted.fetchone()
    return lease_of(row) if row is not None else None


async def grant_lease(conn: Connection, residency_id: str, terms: LeaseTerms, *, lease_id: str) -> Lease:
    """Grants within the caller's transaction, which holds the device's lock and has seen RESIDENT."""
    if terms.request_id:
        await conn.execute(queries.LEASE_STALE_REQUEST, {"request_id": terms.request_id})
    await conn.execute(queries.LEASE_GRANT, {"residency_id": residency_id, **_terms(terms, lease_id)})
    return await _read(conn, lease_id)


def _terms(terms: LeaseTerms, lease_id: str) -> dict[str, Any]:
    return {"id": lease_id, "holder": terms.holder, "ttl_s": terms.ttl_s, "request_id": terms.request_id}


async def _read(conn: Connection, lease_id: str) -> Lease:
    row = await (await conn.execute(queries.LEASE_READ, {"id": lease_id})).fetchone()
    assert row is not None
    return lease_of(row)


async def lease_of_request(conn: Connection, request_id: str, model_id: str) -> Lease | None:
    """Returns the living lease that a call with this id was granted before."""
    if not request_id:
        return None
    await conn.execute(queries.REQUEST_LOCK, {"request_id": request_id})
    row = await (await conn.execute(queries.LEASE_OF_REQUEST, {"request_id": request_id})).fetchone()
    if row is None:
        return None
    if row["model_id"] != model_id:
        raise FieldInvalid("request_id", "was used for a call with other arguments; send a fresh UUID4")
    return lease_of(row)
