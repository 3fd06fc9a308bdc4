"""Statements about activation sets and their pins. An expired pin is as good as gone; a purge removes its row."""

from __future__ import annotations

UPSERT = """
INSERT INTO activation_sets
    (id, node_id, model_id, corpus_id, columns, n_rows, size_bytes, complete, retention, path, last_used_time, holders)
VALUES (%(id)s, %(node_id)s, %(model_id)s, %(corpus_id)s, %(columns)s, %(n_rows)s, %(size_bytes)s, %(complete)s,
        %(retention)s, %(path)s, least(coalesce(%(last_used_time)s::timestamptz, registry_now()), registry_now()),
        %(holders)s)
ON CONFLICT (id, node_id) DO UPDATE
SET model_id = excluded.model_id, corpus_id = excluded.corpus_id, columns = excluded.columns,
    n_rows = excluded.n_rows, size_bytes = excluded.size_bytes, complete = excluded.complete,
    retention = excluded.retention, path = excluded.path, update_time = registry_now(),
    last_used_time = excluded.last_used_time, holders = excluded.holders
RETURNING deleting
"""
DELETE = "DELETE FROM activation_sets WHERE id = %(id)s AND node_id = %(node_id)s"
# Taken before pins are looked at in a statement of its own: of a pin and an eviction, one sees the other.
LOCK = "SELECT * FROM activation_sets WHERE id = %(id)s ORDER BY node_id FOR UPDATE"
READ = "SELECT * FROM activation_sets WHERE id = %(id)s ORDER BY node_id"
LIST = """
SELECT * FROM activation_sets
WHERE (%(model_id)s = '' OR model_id = %(model_id)s) AND (%(node_id)s = '' OR node_id = %(node_id)s)
  AND (%(after_time)s::timestamptz IS NULL
       OR (create_time, id, node_id) < (%(after_time)s::timestamptz, %(after_id)s, %(after_node)s))
ORDER BY create_time DESC, id DESC, node_id DESC LIMIT %(limit)s
"""
# Of nodes that live: what a silent one said of readers is no longer true.
HELD = """
SELECT sets.node_id, sets.holders FROM activation_sets sets JOIN nodes ON nodes.id = sets.node_id
WHERE sets.id = %(id)s AND sets.holders <> '{}' AND nodes.state <> 'LOST' ORDER BY sets.node_id
"""
ORDER_DELETION = "UPDATE activation_sets SET deleting = true, update_time = registry_now() WHERE id = %(id)s"
PINS = """
SELECT * FROM set_pins WHERE set_id = ANY(%(ids)s) AND (expire_time IS NULL OR expire_time > registry_now())
ORDER BY set_id, owner
"""
PIN = """
INSERT INTO set_pins (set_id, owner, reason, expire_time)
VALUES (%(set_id)s, %(owner)s, %(reason)s, %(expire_time)s)
ON CONFLICT (set_id, owner) DO UPDATE SET reason = excluded.reason, expire_time = excluded.expire_time
"""
UNPIN = "DELETE FROM set_pins WHERE set_id = %(set_id)s AND owner = %(owner)s"
IS_PAST = "SELECT %(expire_time)s::timestamptz <= registry_now() AS is_past"
PURGE_PINS = "DELETE FROM set_pins WHERE expire_time < registry_now() - interval '1 day'"
