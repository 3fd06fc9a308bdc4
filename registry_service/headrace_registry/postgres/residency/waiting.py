"""Waiters: AcquireLease renews its own at each poll; LoadModel leaves one behind for a caller that does not wait."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from headrace_registry.postgres.server.pool import Connection
from headrace_registry.residency.leases import DEFAULT_WAIT_S
from headrace_registry.residency.policy import Policy
from headrace_registry.residency.refusals import queue_full
from headrace_registry.residency.wishes import Wish

# Makes counting and adding one step. It is the last lock that a transaction takes, so that it causes no deadlock.
WAITERS_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('headrace waiters', 2))"
WAITERS_COUNT = "SELECT count(*)::int AS n FROM waiters WHERE expire_time > registry_now()"
WAITER_RENEW = """
UPDATE waiters
SET residency_id = %(residency_id)s, expire_time = registry_now() + make_interval(secs => %(ttl_s)s)
WHERE id = %(id)s AND expire_time > registry_now()
RETURNING id
"""
WAITER_UPSERT = """
INSERT INTO waiters (id, residency_id, expire_time, node_id, device_id, standing, actor)
VALUES (%(id)s, %(residency_id)s, registry_now() + make_interval(secs => %(ttl_s)s), %(node_id)s, %(device_id)s,
        %(standing)s, %(actor)s)
ON CONFLICT (id) DO UPDATE SET residency_id = excluded.residency_id, expire_time = excluded.expire_time
"""

# A waiting call renews its waiter at each poll; the waiter of a call that died expires after this.
_CALL_TTL_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """One call's interest in a residency, and the devices its wish allows."""

    id: str
    node_id: str
    device_id: str
    actor: str
    ttl_s: float
    standing: bool

    @staticmethod
    def calling(waiter_id: str, wish: Wish) -> Waiter:
        """The waiter of a call that polls."""
        return _waiter(waiter_id, wish, ttl_s=_CALL_TTL_S, standing=False)

    @staticmethod
    def standing_for(residency_id: str, wish: Wish) -> Waiter:
        """The waiter that LoadModel leaves behind: it lasts as long as AcquireLease waits by default."""
        return _waiter(f"load-{residency_id}", wish, ttl_s=DEFAULT_WAIT_S, standing=True)


async def wait_in_line(conn: Connection, waiter: Waiter, residency_id: str, policy: Policy) -> None:
    """Stores or renews a waiter. Raises QueueFull, which rolls back the whole transaction."""
    values = {**asdict(waiter), "residency_id": residency_id}
    renewed = await conn.execute(WAITER_RENEW, values)
    if renewed.rowcount:
        return
    await conn.execute(WAITERS_LOCK)
    row = await (await conn.execute(WAITERS_COUNT)).fetchone()
    assert row is not None
    if row["n"] >= policy.max_waiters:
        raise queue_full(f"{row['n']} calls wait for a model already")
    await conn.execute(WAITER_UPSERT, values)


def _waiter(waiter_id: str, wish: Wish, *, ttl_s: float, standing: bool) -> Waiter:
    return Waiter(
        id=waiter_id,
        node_id=wish.node_id,
        device_id=wish.device_id,
        actor=wish.actor,
        ttl_s=ttl_s,
        standing=standing,
    )
