"""Statements that several modules execute. A statement that one module executes stands on top of that module.

Everywhere times come from registry_now() of the database, and parameters are bound.
"""

from __future__ import annotations

# Requests -------------------------------------------------------------------------------------------------------------

# Calls with the same id wait for each other: the second one finds the answer of the first.
REQUEST_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%(request_id)s, 0))"

# Models and the model store -------------------------------------------------------------------------------------------

# NO KEY: rows that refer to the model, such as a failed load, are written while the locks of its device are held, and
# must not wait for a call that holds the model and waits for that device.
MODEL_LOCK = "SELECT * FROM models WHERE id = %(id)s FOR NO KEY UPDATE"
# FOR SHARE: loads of a model do not wait for each other, its deletion waits for them.
MODEL_KEEP = """
SELECT *, COALESCE(deleting_until > registry_now(), false) AS deleting FROM models WHERE id = %(id)s FOR SHARE
"""
# One decision at a time about the room in the model store.
STORE_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('the model store', 2))"
LEARNED = """
SELECT node_id, device_id, device_kind, load_dtype, estimated_bytes, measured_bytes FROM learned_sizes
WHERE model_id = %(model_id)s AND quantization = %(quantization)s
ORDER BY time DESC, node_id, device_id
"""

# Nodes ----------------------------------------------------------------------------------------------------------------

NODES_WITH_DEVICE = """
SELECT DISTINCT node_id FROM devices
WHERE present AND (%(node_id)s = '' OR node_id = %(node_id)s) AND (%(device_id)s = '' OR id = %(device_id)s)
"""
# A pin that lasts for longer than `for_good_s` counts as one for good.
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

# Residencies ----------------------------------------------------------------------------------------------------------

RESIDENCY_BRIEF = """
SELECT r.*, (
    SELECT count(*) FROM leases l
    WHERE l.residency_id = r.id AND l.state = 'HELD' AND l.expire_time > registry_now())::int AS n_leases
FROM residencies r
"""
# As people see it: with its queue position, whether it is pinned, and the holders of its leases (20 at most).
RESIDENCY_IN_FULL = """
SELECT r.*, held.n_leases, held.holders,
       EXISTS (SELECT 1 FROM pins p WHERE p.model_id = r.model_id AND p.node_id IN ('', r.node_id)
               AND (p.expire_time IS NULL OR p.expire_time > registry_now())) AS pinned,
       CASE WHEN r.state = 'QUEUED' THEN (
           SELECT count(*) FROM residencies q
           WHERE q.node_id = r.node_id AND q.device_id = r.device_id AND q.state = 'QUEUED'
             AND (q.queue_seq, q.id) <= (r.queue_seq, r.id))::int
       ELSE 0 END AS queue_position
FROM residencies r CROSS JOIN LATERAL (
    SELECT count(*)::int AS n_leases, (array_agg(l.holder ORDER BY l.grant_time, l.id))[:20] AS holders
    FROM leases l WHERE l.residency_id = r.id AND l.state = 'HELD' AND l.expire_time > registry_now()
) held
"""
RESIDENCY_READ = RESIDENCY_BRIEF + "WHERE r.id = %(id)s"
RESIDENCY_FAILURE = "UPDATE residencies SET failure = %(failure)s, transfer = NULL WHERE id = %(id)s"
RESIDENCY_USED = "UPDATE residencies SET last_used_time = registry_now() WHERE id = %(id)s"
RESIDENCY_EVENTS = (
    """
INSERT INTO residency_events (residency_id, model_id, state, reason, actor, residency)
SELECT id, model_id, state, reason, actor, to_jsonb(r) FROM ("""
    + RESIDENCY_IN_FULL
    + "WHERE r.id = ANY(%(ids)s)) r"
)

# Leases and waiters ---------------------------------------------------------------------------------------------------

LEASES_END = """
UPDATE leases SET state = 'LOST', end_time = registry_now()
WHERE residency_id = ANY(%(residency_ids)s) AND state = 'HELD'
"""
WAITER_DELETE = "DELETE FROM waiters WHERE id = %(id)s RETURNING residency_id"
# LoadModel's waiters are done once the residency has loaded or ended.
WAITERS_STANDING_END = "DELETE FROM waiters WHERE residency_id = %(residency_id)s AND standing"
