"""Statements about attempts. They begin and end under the lock of their node's devices, whose bytes they hold."""

from __future__ import annotations

ATTEMPT_INSERT = """
INSERT INTO validation_attempts (id, model_id, node_id, device_id, node_epoch, load_options, quantization,
                                 reserved_bytes, expire_time)
VALUES (%(id)s, %(model_id)s, %(node_id)s, %(device_id)s, %(node_epoch)s, %(load_options)s, %(quantization)s,
        %(reserved_bytes)s, registry_now() + make_interval(secs => %(ttl_s)s))
"""
ATTEMPT_READ = "SELECT * FROM validation_attempts WHERE id = %(id)s"
ATTEMPT_LOCK = "SELECT * FROM validation_attempts WHERE id = %(id)s FOR UPDATE"
ATTEMPT_RENEW = """
UPDATE validation_attempts SET expire_time = registry_now() + make_interval(secs => %(ttl_s)s)
WHERE id = %(id)s AND NOT done
"""
ATTEMPT_REPORT = """
UPDATE validation_attempts
SET steps = %(steps)s, done = %(done)s, passed = %(passed)s, failure = %(failure)s, versions = %(versions)s,
    update_time = registry_now()
WHERE id = %(id)s
"""
# Nobody waits for it any more, or its node's epoch is over, or its node is silent.
ATTEMPTS_OVER = """
SELECT a.id, a.node_id, a.device_id,
       a.expire_time <= registry_now() AS unwatched,
       n.id IS NULL OR n.epoch <> a.node_epoch AS restarted
FROM validation_attempts a LEFT JOIN nodes n ON n.id = a.node_id
WHERE NOT a.done
  AND (a.expire_time <= registry_now() OR n.id IS NULL OR n.epoch <> a.node_epoch OR n.state = 'LOST')
ORDER BY a.node_id, a.id
"""
ATTEMPTS_OF_NODE = """
SELECT a.id AS attempt_id, a.device_id AS attempt_device_id, a.load_options AS attempt_options, m.*
FROM validation_attempts a JOIN models m ON m.id = a.model_id
WHERE a.node_id = %(node_id)s AND a.node_epoch = %(epoch)s AND NOT a.done AND a.expire_time > registry_now()
ORDER BY a.create_time, a.id
"""
ATTEMPTS_LIST = """
SELECT * FROM validation_attempts
WHERE model_id = %(model_id)s AND (NOT %(passed_only)s OR passed)
  AND (%(after_time)s::timestamptz IS NULL OR (create_time, id) < (%(after_time)s::timestamptz, %(after_id)s))
ORDER BY create_time DESC, id DESC LIMIT %(limit)s
"""
