"""Leases in Postgres: granted in the transaction that places the model, renewed and ended by the database's clock."""

from __future__ import annotations

import logging
from typing import Any

from headrace_registry.errors import FieldInvalid, LeaseLost, LeaseNotFound
from headrace_registry.postgres import statements
from headrace_registry.postgres.residency.transitions import plan_and_carry_out_if_awaited
from headrace_registry.postgres.rows import lease_of
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.residency.leases import Lease, LeaseTerms
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.wishes import Wish
from headrace_registry.wakeups import Wakeups

# The whole of AcquireLease on a resident model. Eviction takes the residency's lock too: one of them sees the other.
LEASE_GRANT_RESIDENT = """
WITH chosen AS (
    SELECT r.id FROM residencies r
    WHERE r.model_id = %(model_id)s AND r.state = 'RESIDENT'
      AND (%(node_id)s = '' OR r.node_id = %(node_id)s) AND (%(device_id)s = '' OR r.device_id = %(device_id)s)
    ORDER BY r.queue_seq LIMIT 1 FOR UPDATE
), granted AS (
    UPDATE residencies r SET lease_fence = r.lease_fence + 1, last_used_time = registry_now()
    FROM chosen WHERE r.id = chosen.id RETURNING r.id, r.model_id, r.node_id, r.lease_fence
), leased AS (
    INSERT INTO leases (id, residency_id, model_id, holder, request_id, fence, ttl_s, expire_time)
    SELECT %(id)s, id, model_id, %(holder)s, %(request_id)s, lease_fence, %(ttl_s)s,
           registry_now() + make_interval(secs => %(ttl_s)s)
    FROM granted
    ON CONFLICT (id) DO UPDATE SET fence = excluded.fence, expire_time = excluded.expire_time
    RETURNING id, residency_id, model_id, holder, fence, ttl_s, expire_time
)
SELECT l.*, g.node_id, n.address AS node_address FROM leased l, granted g JOIN nodes n ON n.id = g.node_id
"""
_LEASE = """
SELECT l.*, r.node_id, n.address AS node_address, r.state AS residency_state,
       l.expire_time > registry_now() AS current
FROM leases l JOIN residencies r ON r.id = l.residency_id JOIN nodes n ON n.id = r.node_id
"""
LEASE_READ = _LEASE + "WHERE l.id = %(id)s"
LEASE_OF_REQUEST = (
    _LEASE
    + """
WHERE l.request_id = %(request_id)s AND l.state = 'HELD' AND l.expire_time > registry_now() AND r.state = 'RESIDENT'
"""
)
LEASE_STALE_REQUEST = """
UPDATE leases SET state = 'LOST', end_time = registry_now() WHERE request_id = %(request_id)s AND state = 'HELD'
"""
# ON CONFLICT: a transaction that is run again after a lost connection may have granted the lease already.
LEASE_GRANT = """
WITH granted AS (
    UPDATE residencies SET lease_fence = lease_fence + 1, last_used_time = registry_now()
    WHERE id = %(residency_id)s RETURNING id, model_id, lease_fence
)
INSERT INTO leases (id, residency_id, model_id, holder, request_id, fence, ttl_s, expire_time)
SELECT %(id)s, id, model_id, %(holder)s, %(request_id)s, lease_fence, %(ttl_s)s,
       registry_now() + make_interval(secs => %(ttl_s)s)
FROM granted
ON CONFLICT (id) DO UPDATE SET fence = excluded.fence, expire_time = excluded.expire_time
"""
# DRAINING too: the model stays until its leases end.
LEASE_RENEW = """
UPDATE leases l SET expire_time = registry_now() + make_interval(secs => l.ttl_s)
FROM residencies r
WHERE l.id = %(id)s AND l.fence = %(fence)s AND l.state = 'HELD' AND l.expire_time > registry_now()
  AND r.id = l.residency_id AND r.state IN ('RESIDENT', 'DRAINING')
RETURNING l.id
"""
LEASE_RELEASE = """
UPDATE leases SET state = 'RELEASED', end_time = registry_now()
WHERE id = %(id)s AND fence = %(fence)s AND state = 'HELD'
"""
# `(SELECT registry_now())`: read once, so that the index of held leases serves. SKIP LOCKED: a lease in a call now is
# looked at again in a second, and no two replicas wait for each other's rows.
LEASES_EXPIRE = """
UPDATE leases SET state = 'EXPIRED', end_time = registry_now()
WHERE id IN (SELECT id FROM leases WHERE state = 'HELD' AND expire_time <= (SELECT registry_now())
             ORDER BY expire_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
"""

log = logging.getLogger(__name__)

_EXPIRED_AT_ONCE = 1000


class LeaseStore:
    """Reads and writes for RenewLease, ReleaseLease and the expiry of leases."""

    def __init__(self, database: Database, wakeups: Wakeups, policy: Policy | None = None) -> None:
        self._database = database
        self._wakeups = wakeups
        self._policy = policy or Policy()

    async def renew(self, lease_id: str, fence: int) -> Lease:
        """Extends a living lease by its time to live. Raises LeaseLost, LeaseNotFound."""

        async def work(conn: Connection) -> Lease:
            renewed = await (await conn.execute(LEASE_RENEW, {"id": lease_id, "fence": fence})).fetchone()
            row = await (await conn.execute(LEASE_READ, {"id": lease_id})).fetchone()
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
            row = await (await conn.execute(LEASE_READ, {"id": lease_id})).fetchone()
            if row is None or row["state"] != "HELD":
                return ""
            if row["fence"] != fence:
                raise LeaseLost(
                    f"fence {fence} is not that of lease {lease_id!r}; release with the fence it was granted with",
                    resource=("lease", lease_id),
                )
            # Residency before lease: ending a residency takes its locks in this order.
            await conn.execute(statements.RESIDENCY_USED, {"id": row["residency_id"]})
            await conn.execute(LEASE_RELEASE, {"id": lease_id, "fence": fence})
            return str(row["node_id"])

        node_id = await self._database.run(work)
        if node_id and await plan_and_carry_out_if_awaited(self._database, node_id, self._policy):
            self._wakeups.wake()

    async def expire(self) -> int:
        """Ends the leases that ran out, a thousand at most; returns how many."""

        async def work(conn: Connection) -> int:
            return (await conn.execute(LEASES_EXPIRE, {"limit": _EXPIRED_AT_ONCE})).rowcount

        n_expired = await self._database.run(work)
        if n_expired:
            log.info("%d leases expired", n_expired)
            self._wakeups.wake()
        return n_expired


async def grant_resident(conn: Connection, wish: Wish, terms: LeaseTerms, *, lease_id: str) -> Lease | None:
    """Grants at once if the model is resident where the wish allows it, else returns None.

    Takes no lock but the residency's. It is one statement, unless the terms name a request.
    """
    values = {"model_id": wish.model_id, "node_id": wish.node_id, "device_id": wish.device_id}
    if terms.request_id:
        await conn.execute(LEASE_STALE_REQUEST, {"request_id": terms.request_id})
    granted = await conn.execute(LEASE_GRANT_RESIDENT, {**values, **_terms(terms, lease_id)})
    row = await granted.fetchone()
    return lease_of(row) if row is not None else None


async def grant_lease(conn: Connection, residency_id: str, terms: LeaseTerms, *, lease_id: str) -> Lease:
    """Grants in the caller's transaction, which holds the device's lock and has read the state RESIDENT."""
    if terms.request_id:
        await conn.execute(LEASE_STALE_REQUEST, {"request_id": terms.request_id})
    await conn.execute(LEASE_GRANT, {"residency_id": residency_id, **_terms(terms, lease_id)})
    row = await (await conn.execute(LEASE_READ, {"id": lease_id})).fetchone()
    assert row is not None
    return lease_of(row)


async def lease_of_request(conn: Connection, request_id: str, model_id: str) -> Lease | None:
    """Returns the living lease that an earlier call with this request id was granted. Raises FieldInvalid.

    Holds the request id until the transaction ends, so that two calls with one id do not both get a lease.
    """
    if not request_id:
        return None
    await conn.execute(statements.REQUEST_LOCK, {"request_id": request_id})
    row = await (await conn.execute(LEASE_OF_REQUEST, {"request_id": request_id})).fetchone()
    if row is None:
        return None
    if row["model_id"] != model_id:
        raise FieldInvalid("request_id", "was used for a call with other arguments; send a fresh UUID4")
    return lease_of(row)


def _terms(terms: LeaseTerms, lease_id: str) -> dict[str, Any]:
    return {"id": lease_id, "holder": terms.holder, "ttl_s": terms.ttl_s, "request_id": terms.request_id}
