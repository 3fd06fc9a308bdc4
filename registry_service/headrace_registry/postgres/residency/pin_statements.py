"""Statements about pins. An expired one is as good as gone; upkeep removes its row."""

from __future__ import annotations

IN_FUTURE = "SELECT %(expire_time)s::timestamptz > registry_now() AS in_future"
UPSERT = """
INSERT INTO pins (model_id, node_id, owner, reason, expire_time)
VALUES (%(model_id)s, %(node_id)s, %(owner)s, %(reason)s, %(expire_time)s)
ON CONFLICT (model_id, node_id, owner) DO UPDATE
SET reason = excluded.reason, expire_time = excluded.expire_time,
    create_time = CASE WHEN pins.expire_time <= registry_now() THEN registry_now() ELSE pins.create_time END
RETURNING *
"""
READ = "SELECT * FROM pins WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND owner = %(owner)s"
DELETE = """
DELETE FROM pins WHERE model_id = %(model_id)s AND node_id = %(node_id)s AND owner = %(owner)s
RETURNING expire_time IS NULL OR expire_time > registry_now() AS living
"""
LIST = """
SELECT * FROM pins
WHERE (%(model_id)s = '' OR model_id = %(model_id)s) AND (expire_time IS NULL OR expire_time > registry_now())
  AND (%(after_model)s::text IS NULL
       OR (model_id, node_id, owner) > (%(after_model)s, %(after_node)s, %(after_owner)s))
ORDER BY model_id, node_id, owner LIMIT %(limit)s
"""
OWNERS = """
SELECT DISTINCT owner FROM pins
WHERE model_id = %(model_id)s AND (%(node_id)s = '' OR node_id IN ('', %(node_id)s))
  AND (expire_time IS NULL OR expire_time > registry_now())
ORDER BY owner LIMIT 20
"""
PURGE_EXPIRED = "DELETE FROM pins WHERE expire_time <= registry_now() RETURNING model_id, node_id, owner"
NODE_KNOWN = "SELECT 1 FROM nodes WHERE id = %(node_id)s"
