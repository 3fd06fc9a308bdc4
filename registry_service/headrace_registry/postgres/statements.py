"""Every statement by name. Times come from registry_now() of the database; parameters are bound."""

from __future__ import annotations

# Requests ------------------------------------------------------------------------------------------------------------

REQUEST_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%(request_id)s, 0))"
REQUEST_READ = "SELECT arguments, response FROM requests WHERE request_id = %(request_id)s AND method = %(method)s"
REQUEST_WRITE = """
INSERT INTO requests (request_id, method, arguments, response)
VALUES (%(request_id)s, %(method)s, %(arguments)s, %(response)s)
"""

# Models --------------------------------------------------------------------------------------------------------------

MODEL_READ = "SELECT * FROM models WHERE id = %(id)s"
MODEL_LOCK = "SELECT * FROM models WHERE id = %(id)s FOR UPDATE"
MODEL_KEEP = """
SELECT *, COALESCE(deleting_until > registry_now(), false) AS deleting FROM models WHERE id = %(id)s FOR SHARE
"""
# Longer than a deletion waits for memory.
MODEL_DELETING = "UPDATE models SET deleting_until = registry_now() + interval '30 s' WHERE id = %(id)s"
IDENTITY_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%(identity)s, 1))"
MODEL_OF_IDENTITY = "SELECT * FROM models WHERE identity = %(identity)s ORDER BY create_time, id LIMIT 1"
MODEL_INSERT = """
INSERT INTO models (id, identity, source_kind, location, source_revision, quantization, load_options, labels)
VALUES (%(id)s, %(identity)s, %(source_kind)s, %(location)s, %(source_revision)s, %(quantization)s,
        %(load_options)s, %(labels)s)
ON CONFLICT (id) DO NOTHING
RETURNING id
"""
MODEL_DELETE = "DELETE FROM models WHERE id = %(id)s"
MODEL_TOUCH = """
WITH touched AS (
    UPDATE models
    SET event_seq = event_seq + 1, revision = revision + 1, update_time = registry_now()
    WHERE id = %(id)s
    RETURNING *
), recorded AS (
    INSERT INTO model_events (model_id, seq, time, message, model)
    SELECT id, event_seq, update_time, %(message)s, to_jsonb(touched) FROM touched
), trimmed AS (
    DELETE FROM model_events e USING touched t WHERE e.model_id = t.id AND e.seq <= t.event_seq - %(keep)s
)
SELECT * FROM touched
"""
MODEL_SNAPSHOT = "SELECT *, registry_now() AS now FROM models WHERE id = %(id)s"
MODEL_EVENTS = """
SELECT seq, time, message, model FROM model_events
WHERE model_id = %(id)s AND seq > %(after_seq)s
ORDER BY seq LIMIT %(limit)s
"""

# Preparations --------------------------------------------------------------------------------------------------------

PREPARATION_INSERT = """
INSERT INTO preparations (model_id, claimed_by, claim_expire_time)
VALUES (%(model_id)s, %(worker)s, registry_now() + make_interval(secs => %(claim_s)s))
ON CONFLICT (model_id) DO NOTHING
"""
PREPARATION_DELETE = "DELETE FROM preparations WHERE model_id = %(model_id)s RETURNING model_id"
PREPARATION_HOLD = """
SELECT * FROM preparations WHERE model_id = %(model_id)s AND claimed_by = %(worker)s FOR UPDATE
"""
PREPARATIONS_CLAIM = """
UPDATE preparations p
SET claimed_by = %(worker)s, claim_expire_time = registry_now() + make_interval(secs => %(claim_s)s)
FROM (
    SELECT model_id FROM preparations
    WHERE (claimed_by IS NULL OR claimed_by = %(worker)s OR claim_expire_time < registry_now())
      AND NOT model_id = ANY(%(running)s)
    ORDER BY create_time LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
) free
WHERE p.model_id = free.model_id
RETURNING p.model_id
"""
PREPARATIONS_RENEW = """
UPDATE preparations
SET claim_expire_time = registry_now() + make_interval(secs => %(claim_s)s)
WHERE claimed_by = %(worker)s AND model_id = ANY(%(running)s)
RETURNING model_id
"""
PREPARATIONS_RELEASE = """
UPDATE preparations SET claimed_by = NULL, claim_expire_time = NULL
WHERE %(worker)s::text IS NULL OR claimed_by = %(worker)s
"""
BUILD_ASSIGN = """
UPDATE preparations
SET node_id = %(node_id)s, target_path = %(target_path)s, source_path = %(source_path)s, done = false, failure = NULL,
    fidelity = NULL, report_time = registry_now()
WHERE model_id = %(model_id)s
"""
# What was made is about to go; whoever takes the preparation up again has it made anew.
BUILD_UNDO = "UPDATE preparations SET node_id = NULL, target_path = '', done = false WHERE model_id = %(model_id)s"
BUILD_CHOOSE_NODE = """
SELECT n.id FROM nodes n
LEFT JOIN preparations p ON p.node_id = n.id AND NOT p.done
WHERE n.state = 'ALIVE'
GROUP BY n.id ORDER BY count(p.model_id), n.id LIMIT 1
"""
BUILD_READ = """
SELECT p.*, n.state AS node_state, extract(epoch FROM registry_now() - p.report_time)::float8 AS silent_s
FROM preparations p LEFT JOIN nodes n ON n.id = p.node_id
WHERE p.model_id = %(model_id)s AND p.claimed_by = %(worker)s
"""
BUILDS_OF_NODE = """
SELECT m.*, p.target_path, p.source_path FROM preparations p JOIN models m ON m.id = p.model_id
WHERE p.node_id = %(node_id)s AND p.target_path <> '' AND NOT p.done AND p.failure IS NULL
ORDER BY p.create_time, m.id
"""
# What is done stays done: a word on progress may come later than the last one.
BUILD_REPORT = """
UPDATE preparations
SET done = done OR %(done)s, failure = COALESCE(%(failure)s, failure), fidelity = COALESCE(%(fidelity)s, fidelity),
    report_time = registry_now()
WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND %(target_path)s IN ('', target_path)
RETURNING model_id
"""

# Nodes ---------------------------------------------------------------------------------------------------------------

# Node and residencies must be of one moment: half a LOST node would be told to drop what it holds.
NODE_KEEP = "SELECT * FROM nodes WHERE id = %(id)s FOR SHARE"
NODE_LOCK = "SELECT * FROM nodes WHERE id = %(id)s FOR UPDATE"
NODE_INSERT = """
INSERT INTO nodes (id, address, epoch, boot_nonce, state, version)
VALUES (%(id)s, %(address)s, 0, '', 'ALIVE', %(version)s)
ON CONFLICT (id) DO NOTHING
"""
NODE_ANNOUNCE = """
UPDATE nodes
SET address = %(address)s, epoch = %(epoch)s, boot_nonce = %(boot_nonce)s, version = %(version)s,
    memory_bytes = %(memory_bytes)s, runtime_bytes = %(runtime_bytes)s, max_loads = %(max_loads)s,
    max_residents = %(max_residents)s
WHERE id = %(id)s
"""
NODE_MEMORY = """
UPDATE nodes SET memory_free_bytes = %(memory_free_bytes)s,
    runtime_bytes = CASE WHEN %(runtime_bytes)s > 0 THEN %(runtime_bytes)s ELSE runtime_bytes END
WHERE id = %(id)s
"""
NODE_HEARD = "UPDATE nodes SET state = 'ALIVE', heartbeat_time = registry_now() WHERE id = %(id)s"
NODES_SILENT = """
SELECT id FROM nodes
WHERE state = 'ALIVE' AND heartbeat_time < registry_now() - make_interval(secs => %(silent_s)s)
ORDER BY id FOR UPDATE SKIP LOCKED
"""
NODE_LOST = "UPDATE nodes SET state = 'LOST' WHERE id = %(id)s"
NODES_LIST = """
SELECT * FROM nodes WHERE %(after)s::text IS NULL OR id > %(after)s ORDER BY id LIMIT %(limit)s
"""
DEVICES_ABSENT = "UPDATE devices SET present = false WHERE node_id = %(node_id)s"
NODES_LIVING = "SELECT * FROM nodes WHERE state = 'ALIVE' ORDER BY id"
DEVICES_PRESENT = "SELECT * FROM devices WHERE present AND node_id = ANY(%(node_ids)s) ORDER BY node_id, ordinal, id"
DEVICE_UPSERT = """
INSERT INTO devices (node_id, id, kind, name, capacity_bytes, free_bytes, total_bytes, lost_bytes, capability,
                     flash_attention, ordinal)
VALUES (%(node_id)s, %(id)s, %(kind)s, %(name)s, %(capacity_bytes)s, %(free_bytes)s, %(total_bytes)s, %(lost_bytes)s,
        %(capability)s, %(flash_attention)s, %(ordinal)s)
ON CONFLICT (node_id, id) DO UPDATE
SET kind = excluded.kind, name = excluded.name, capacity_bytes = excluded.capacity_bytes,
    free_bytes = excluded.free_bytes, total_bytes = excluded.total_bytes, lost_bytes = excluded.lost_bytes,
    capability = excluded.capability, flash_attention = excluded.flash_attention, ordinal = excluded.ordinal,
    present = true
"""
# `was` is the row before the update.
DEVICE_PULSE = """
UPDATE devices d SET free_bytes = %(free_bytes)s, lost_bytes = %(lost_bytes)s
FROM devices was
WHERE d.node_id = %(node_id)s AND d.id = %(id)s AND was.node_id = d.node_id AND was.id = d.id
RETURNING d.lost_bytes <> was.lost_bytes AS lost_changed
"""
DEVICES_OF_NODES = """
SELECT d.*, COALESCE((
    SELECT sum(r.reserved_bytes) FROM residencies r
    WHERE r.node_id = d.node_id AND r.device_id = d.id
      AND r.state IN ('LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING')), 0)::bigint AS reserved_bytes
FROM devices d WHERE d.node_id = ANY(%(node_ids)s) AND d.present ORDER BY d.node_id, d.ordinal, d.id
"""
DEVICES_OF_NODE_LOCK = "SELECT id FROM devices WHERE node_id = %(node_id)s ORDER BY id FOR UPDATE"

# Residencies ---------------------------------------------------------------------------------------------------------

_RESIDENCY = """
SELECT r.*, (
    SELECT count(*) FROM leases l
    WHERE l.residency_id = r.id AND l.state = 'HELD' AND l.expire_time > registry_now())::int AS n_leases
FROM residencies r
"""
# As people see it: with its place in line, its pins and who holds it (20 at most).
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
RESIDENCY_READ = _RESIDENCY + "WHERE r.id = %(id)s"
RESIDENCIES_OF_IDS = RESIDENCY_IN_FULL + "WHERE r.id = ANY(%(ids)s)"
RESIDENCIES_ACTIVE = (
    RESIDENCY_IN_FULL
    + """
WHERE (%(model_id)s = '' OR r.model_id = %(model_id)s) AND r.state NOT IN ('UNLOADED', 'FAILED', 'LOST')
ORDER BY r.create_time, r.id
"""
)
RESIDENCIES_LIST = (
    RESIDENCY_IN_FULL
    + """
WHERE (%(model_id)s = '' OR r.model_id = %(model_id)s) AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
  AND (%(include_ended)s OR r.state NOT IN ('UNLOADED', 'FAILED', 'LOST'))
  AND (%(after_time)s::timestamptz IS NULL OR (r.create_time, r.id) < (%(after_time)s::timestamptz, %(after_id)s))
ORDER BY r.create_time DESC, r.id DESC LIMIT %(limit)s
"""
)
RESIDENCIES_ASSIGNED = (
    _RESIDENCY
    + """
WHERE r.node_id = %(node_id)s AND r.node_epoch = %(epoch)s
  AND r.state IN ('LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING')
ORDER BY r.create_time, r.id
"""
)
MODELS_OF_IDS = "SELECT * FROM models WHERE id = ANY(%(ids)s)"
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
RESIDENCY_FAILURE = "UPDATE residencies SET failure = %(failure)s, transfer = NULL WHERE id = %(id)s"
RESIDENCY_USED = "UPDATE residencies SET last_used_time = registry_now() WHERE id = %(id)s"
RESIDENCY_EVENT = (
    """
INSERT INTO residency_events (residency_id, model_id, state, reason, actor, residency)
SELECT id, model_id, state, reason, actor, to_jsonb(r) FROM ("""
    + RESIDENCY_IN_FULL
    + "WHERE r.id = %(id)s) r"
)
RESIDENCIES_LOSE = """
UPDATE residencies
SET state = CASE WHEN %(silent)s AND state = 'QUEUED' THEN 'UNLOADED' ELSE 'LOST' END,
    state_when_lost = CASE WHEN %(silent)s AND state <> 'QUEUED' THEN state END,
    reason = %(reason)s, actor = 'registry', update_time = registry_now()
WHERE node_id = %(node_id)s
  AND (state NOT IN ('UNLOADED', 'FAILED', 'LOST') OR (NOT %(silent)s AND state_when_lost IS NOT NULL))
RETURNING id
"""
RESIDENCIES_REVIVE = """
UPDATE residencies
SET state = state_when_lost, state_when_lost = NULL, reason = %(reason)s, actor = 'registry',
    update_time = registry_now()
WHERE node_id = %(node_id)s AND node_epoch = %(epoch)s AND state = 'LOST' AND state_when_lost IS NOT NULL
RETURNING id
"""
RESIDENCIES_ACTIVE_OF_MODEL = """
SELECT id, node_id, device_id, state FROM residencies
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND state NOT IN ('UNLOADED', 'FAILED', 'LOST')
ORDER BY node_id, device_id, id FOR UPDATE
"""
HOLDERS_OF_MODEL = """
SELECT l.holder FROM leases l JOIN residencies r ON r.id = l.residency_id
WHERE r.model_id = %(model_id)s AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
  AND l.state = 'HELD' AND l.expire_time > registry_now()
ORDER BY l.grant_time LIMIT 20
"""
WAITER_UPSERT = """
INSERT INTO waiters (id, residency_id, expire_time)
VALUES (%(id)s, %(residency_id)s, registry_now() + make_interval(secs => %(ttl_s)s))
ON CONFLICT (id) DO UPDATE SET residency_id = excluded.residency_id, expire_time = excluded.expire_time
"""

# Leases --------------------------------------------------------------------------------------------------------------

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
LEASE_TAKE_BACK = """
UPDATE leases SET state = 'RELEASED', end_time = registry_now() WHERE id = %(id)s AND state = 'HELD'
RETURNING residency_id
"""
LEASES_END = """
UPDATE leases SET state = 'LOST', end_time = registry_now()
WHERE residency_id = ANY(%(residency_ids)s) AND state = 'HELD'
"""
LEASES_TAKE = """
UPDATE leases SET state = 'LOST', end_time = registry_now(), end_reason = %(reason)s
WHERE residency_id = ANY(%(residency_ids)s) AND state = 'HELD'
"""
LEASES_EXPIRE = """
WITH expired AS (
    UPDATE leases SET state = 'EXPIRED', end_time = registry_now()
    WHERE state = 'HELD' AND expire_time <= registry_now() RETURNING residency_id
)
SELECT count(*)::int AS n FROM expired
"""

# Upkeep --------------------------------------------------------------------------------------------------------------

# A day is longer than any client retries one request; a week of ended residencies answers "what happened".
PURGE = (
    "DELETE FROM requests WHERE create_time < registry_now() - interval '1 day'",
    "DELETE FROM leases WHERE state <> 'HELD' AND end_time < registry_now() - interval '1 day'",
    """
DELETE FROM residencies
WHERE state IN ('UNLOADED', 'FAILED', 'LOST') AND update_time < registry_now() - interval '7 days'
""",
)
