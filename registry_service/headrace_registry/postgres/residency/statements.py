"""Every statement about admission, queues and failure memory. Times come from registry_now() of the database."""

from __future__ import annotations

# A node as decisions see it ------------------------------------------------------------------------------------------

NODES_OF_PLACE = """
SELECT DISTINCT node_id FROM devices
WHERE present AND (%(node_id)s = '' OR node_id = %(node_id)s) AND (%(device_id)s = '' OR id = %(device_id)s)
"""
# All devices of a node at once: its limits count over all of them. No join with nodes here: after a wait for the lock,
# Postgres reads the locked row anew, but not the joined one.
DEVICES_OF_NODES_LOCK = """
SELECT d.*, COALESCE((
    SELECT sum(a.reserved_bytes) FROM validation_attempts a
    WHERE a.node_id = d.node_id AND a.device_id = d.id AND NOT a.done), 0)::bigint AS validating_bytes
FROM devices d WHERE d.node_id = ANY(%(node_ids)s) ORDER BY d.node_id, d.id FOR UPDATE OF d
"""
# Leases are granted under the residency's lock alone; what is read of them after this stays true.
RESIDENCIES_OF_NODES_LOCK = """
SELECT id FROM residencies
WHERE node_id = ANY(%(node_ids)s) AND state NOT IN ('UNLOADED', 'FAILED', 'LOST') ORDER BY id FOR UPDATE
"""
LIVING_NODES = """
SELECT * FROM nodes WHERE id = ANY(%(node_ids)s) AND state = 'ALIVE' ORDER BY id
"""
OCCUPANTS_OF_NODES = """
SELECT r.id, r.model_id, r.node_id, r.device_id, r.state, r.reserved_bytes, r.queue_seq, r.actor,
       extract(epoch FROM clock.now - r.state_time)::float8 AS age_s,
       extract(epoch FROM clock.now - r.last_used_time)::float8 AS idle_s,
       ARRAY(SELECT l.holder FROM leases l WHERE l.residency_id = r.id AND l.state = 'HELD'
             AND l.expire_time > clock.now ORDER BY l.grant_time, l.id) AS holders,
       (SELECT count(*) FROM waiters w WHERE w.residency_id = r.id AND w.expire_time > clock.now)::int AS n_waiters,
       p.n_pins > 0 AS pinned, p.n_for_good > 0 AS pinned_for_good
FROM residencies r
CROSS JOIN (SELECT registry_now() AS now) clock
CROSS JOIN LATERAL (
    SELECT count(*) AS n_pins,
           count(*) FILTER (WHERE expire_time IS NULL
                            OR expire_time > clock.now + make_interval(secs => %(for_good_s)s)) AS n_for_good
    FROM pins
    WHERE model_id = r.model_id AND node_id IN ('', r.node_id) AND (expire_time IS NULL OR expire_time > clock.now)
) p
WHERE r.node_id = ANY(%(node_ids)s) AND r.state NOT IN ('UNLOADED', 'FAILED', 'LOST')
ORDER BY r.queue_seq
"""

# Transitions ---------------------------------------------------------------------------------------------------------

RESIDENCY_INSERT = """
INSERT INTO residencies (id, model_id, node_id, device_id, state, reserved_bytes, admitted_bytes, estimated_bytes,
                         load_dtype, fence, node_epoch, reason, actor)
VALUES (%(id)s, %(model_id)s, %(node_id)s, %(device_id)s, 'QUEUED', %(reserved_bytes)s, %(reserved_bytes)s,
        %(estimated_bytes)s, %(load_dtype)s, nextval('residency_fences'), %(node_epoch)s, %(reason)s, %(actor)s)
"""
RESIDENCY_MOVE = """
UPDATE residencies
SET state_time = CASE WHEN state = %(state)s THEN state_time ELSE registry_now() END,
    state = %(state)s, reason = %(reason)s, actor = %(actor)s, update_time = registry_now(),
    fence = CASE WHEN %(new_fence)s THEN nextval('residency_fences') ELSE fence END,
    state_when_lost = NULL
WHERE id = %(id)s
"""
RESIDENCY_LOST_BYTES = """
UPDATE devices SET lost_bytes = lost_bytes + %(lost_bytes)s WHERE node_id = %(node_id)s AND id = %(device_id)s
"""
# Also what a silent node would bring back.
RESIDENCIES_OF_MODEL_TO_END = """
SELECT id, state FROM residencies
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND (state NOT IN ('UNLOADED', 'FAILED', 'LOST') OR state_when_lost IS NOT NULL)
ORDER BY node_id, device_id, id FOR UPDATE
"""

# Waiters -------------------------------------------------------------------------------------------------------------

# Counting and adding are one step; taken last, so that it waits for nobody who waits for it.
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
WAITER_DELETE = "DELETE FROM waiters WHERE id = %(id)s RETURNING residency_id"
WAITERS_EXPIRE = "DELETE FROM waiters WHERE expire_time <= registry_now()"
# A residency that loaded or ended needs no place in line any more.
WAITERS_STANDING_END = "DELETE FROM waiters WHERE residency_id = %(residency_id)s AND standing"
WAITERS_STANDING = """
SELECT w.id, w.node_id, w.device_id, w.actor, r.model_id, r.id AS residency_id
FROM waiters w JOIN residencies r ON r.id = w.residency_id
WHERE w.standing AND r.state = 'QUEUED' AND w.expire_time > registry_now()
ORDER BY r.queue_seq, w.id
"""
WAITER_MOVE = "UPDATE waiters SET residency_id = %(residency_id)s WHERE id = %(id)s"
POSITION = """
SELECT count(*)::int AS position FROM residencies o JOIN residencies r
    ON r.node_id = o.node_id AND r.device_id = o.device_id
WHERE r.id = %(id)s AND r.state = 'QUEUED' AND o.state = 'QUEUED' AND o.queue_seq <= r.queue_seq
"""

# Upkeep --------------------------------------------------------------------------------------------------------------

# Living nodes where time may have changed what is due.
NODES_DUE = """
SELECT DISTINCT r.node_id FROM residencies r JOIN nodes n ON n.id = r.node_id
WHERE n.state = 'ALIVE' AND (
    r.state IN ('QUEUED', 'DRAINING')
    OR (r.state = 'RESIDENT' AND %(idle_timeout_s)s > 0
        AND GREATEST(r.last_used_time, r.state_time) <= registry_now() - make_interval(secs => %(idle_timeout_s)s))
)
ORDER BY r.node_id
"""
NODE_IS_AWAITED = """
SELECT EXISTS (SELECT 1 FROM residencies WHERE node_id = %(node_id)s AND state IN ('QUEUED', 'DRAINING')) AS awaited
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

# Failure memory and learned sizes ------------------------------------------------------------------------------------

BACKOFFS = """
SELECT f.node_id, f.device_id, f.failure, extract(epoch FROM f.retry_time - registry_now())::float8 AS left_s
FROM load_failures f JOIN models m ON m.id = f.model_id
WHERE f.model_id = %(model_id)s AND f.retry_time > registry_now() AND f.load_options = m.load_options
"""
FAILURE_READ = """
SELECT f.n_failures, f.n_deaths,
       extract(epoch FROM registry_now() - f.retry_time)::float8 AS since_retry_s,
       extract(epoch FROM registry_now() - f.death_time)::float8 AS since_death_s
FROM load_failures f JOIN models m ON m.id = f.model_id
WHERE f.model_id = %(model_id)s AND f.node_id = %(node_id)s AND f.device_id = %(device_id)s
  AND f.load_options = m.load_options
"""
FAILURE_WRITE = """
INSERT INTO load_failures (model_id, node_id, device_id, load_options, n_failures, n_deaths, failure, retry_time,
                           death_time)
SELECT id, %(node_id)s, %(device_id)s, load_options, %(n_failures)s, %(n_deaths)s, %(failure)s,
       registry_now() + make_interval(secs => %(backoff_s)s), CASE WHEN %(died)s THEN registry_now() END
FROM models WHERE id = %(model_id)s
ON CONFLICT (model_id, node_id, device_id) DO UPDATE
SET load_options = excluded.load_options, n_failures = excluded.n_failures, n_deaths = excluded.n_deaths,
    failure = excluded.failure, retry_time = excluded.retry_time, fail_time = registry_now(),
    death_time = COALESCE(excluded.death_time, load_failures.death_time)
"""
# Deaths are remembered over a success: one that loads and dies in turns is no success.
FAILURE_CLEAR = """
UPDATE load_failures SET n_failures = 0, retry_time = registry_now()
WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND device_id = %(device_id)s
"""
LEARN = """
INSERT INTO learned_sizes (model_id, load_dtype, quantization, node_id, device_id, device_kind, estimated_bytes,
                           measured_bytes)
SELECT r.model_id, r.load_dtype, m.quantization, r.node_id, r.device_id, d.kind, r.estimated_bytes, r.measured_bytes
FROM residencies r JOIN models m ON m.id = r.model_id JOIN devices d ON d.node_id = r.node_id AND d.id = r.device_id
WHERE r.id = %(id)s AND r.measured_bytes > 0 AND r.estimated_bytes > 0
ON CONFLICT (model_id, load_dtype, quantization, node_id, device_id) DO UPDATE
SET device_kind = excluded.device_kind, estimated_bytes = excluded.estimated_bytes,
    measured_bytes = excluded.measured_bytes, time = registry_now()
"""
LEARNED = """
SELECT node_id, device_id, device_kind, load_dtype, estimated_bytes, measured_bytes FROM learned_sizes
WHERE model_id = %(model_id)s AND quantization = %(quantization)s
ORDER BY time DESC, node_id, device_id
"""

# Leases --------------------------------------------------------------------------------------------------------------

# The whole of AcquireLease on a resident model. The residency's lock is what eviction takes too.
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
