"""Statements about the folders of the model store."""

from __future__ import annotations

# One decision at a time about what has room.
STORE_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('the model store', 2))"
FOLDER_UPSERT = """
INSERT INTO store_folders (path, model_id, reserved_bytes)
VALUES (%(path)s, %(model_id)s, %(reserved_bytes)s)
ON CONFLICT (path) DO UPDATE
SET model_id = excluded.model_id, reserved_bytes = excluded.reserved_bytes, doom_time = NULL
"""
FOLDER_IS_DOOMED = "SELECT doom_time IS NOT NULL AS doomed FROM store_folders WHERE path = %(path)s FOR UPDATE"
FOLDER_DOOM = "UPDATE store_folders SET doom_time = registry_now(), reserved_bytes = 0 WHERE path = %(path)s"
FOLDER_DOOM_UNUSED = """
UPDATE store_folders f SET doom_time = registry_now(), reserved_bytes = 0
WHERE f.path = %(path)s AND f.doom_time IS NULL
  AND NOT EXISTS (SELECT 1 FROM models m
                  WHERE m.files_path = f.path OR (m.source_kind = 'folder' AND m.location = f.path))
  AND NOT EXISTS (SELECT 1 FROM preparations p
                  WHERE p.model_id = f.model_id OR f.path IN (p.target_path, p.source_path))
"""
# Before the statement that dooms them: what others decided about them while this waited is seen by that one only.
FOLDERS_LOCK_OF_MODEL = """
SELECT path FROM store_folders f
WHERE f.model_id = %(id)s OR f.path = (SELECT files_path FROM models WHERE id = %(id)s)
ORDER BY path FOR UPDATE
"""
FOLDERS_DOOM_OF_MODEL = """
UPDATE store_folders f SET doom_time = registry_now(), reserved_bytes = 0
WHERE (f.model_id = %(id)s OR f.path = (SELECT files_path FROM models WHERE id = %(id)s)) AND f.doom_time IS NULL
  AND NOT EXISTS (SELECT 1 FROM models o WHERE o.id <> %(id)s
                  AND (o.files_path = f.path OR (o.source_kind = 'folder' AND o.location = f.path)))
  AND NOT EXISTS (SELECT 1 FROM preparations p WHERE p.model_id <> %(id)s
                  AND (p.model_id = f.model_id OR f.path IN (p.target_path, p.source_path)))
"""
# Nobody dooms it until the transaction ends.
FOLDER_KEEP = "SELECT doom_time IS NOT NULL AS doomed FROM store_folders WHERE path = %(path)s FOR SHARE"
FOLDERS_DOOM_ORPHANS = """
UPDATE store_folders SET doom_time = registry_now(), reserved_bytes = 0
WHERE path IN (
    SELECT f.path FROM store_folders f
    WHERE f.doom_time IS NULL AND NOT EXISTS (SELECT 1 FROM models m WHERE m.id = f.model_id)
      AND NOT EXISTS (SELECT 1 FROM preparations p WHERE p.source_path = f.path)
      AND NOT EXISTS (SELECT 1 FROM models m
                      WHERE m.files_path = f.path OR (m.source_kind = 'folder' AND m.location = f.path))
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED)
RETURNING path
"""
FOLDERS_DOOMED = """
SELECT path FROM store_folders WHERE doom_time IS NOT NULL
ORDER BY doom_time LIMIT %(limit)s FOR UPDATE SKIP LOCKED
"""
# A node may still be making what was given up; its result is removed too if it comes within the hour.
FOLDERS_FORGET = """
DELETE FROM store_folders WHERE path = ANY(%(paths)s) AND doom_time < registry_now() - interval '1 hour'
"""
FOLDERS_WANTED = "SELECT target_path FROM preparations WHERE target_path <> ''"
# Used: loaded somewhere or on its way, on a node that may come back, pinned, in preparation, or somebody's own source.
FOLDERS = """
SELECT f.path, u.ids AS models, u.gguf,
       CASE WHEN EXISTS (SELECT 1 FROM preparations p WHERE p.model_id = f.model_id)
            THEN f.reserved_bytes ELSE 0 END AS reserved_bytes,
       extract(epoch FROM COALESCE(u.last_used, f.create_time))::float8 AS last_used,
       EXISTS (SELECT 1 FROM preparations p
               WHERE p.model_id = f.model_id OR f.path IN (p.target_path, p.source_path)
                  OR p.model_id = ANY(u.ids))
    OR EXISTS (SELECT 1 FROM residencies r WHERE r.model_id = ANY(u.ids)
               AND (r.state NOT IN ('UNLOADED', 'FAILED', 'LOST') OR r.state_when_lost IS NOT NULL))
    OR EXISTS (SELECT 1 FROM pins p WHERE p.model_id = ANY(u.ids)
               AND (p.expire_time IS NULL OR p.expire_time > registry_now()))
    OR EXISTS (SELECT 1 FROM models m WHERE m.source_kind = 'folder' AND m.location = f.path) AS in_use
FROM store_folders f
CROSS JOIN LATERAL (
    SELECT COALESCE(array_agg(m.id ORDER BY m.id), '{}') AS ids,
           COALESCE(array_agg(m.location) FILTER (WHERE m.source_kind = 'gguf'), '{}') AS gguf,
           max(GREATEST(m.create_time, m.last_used_time,
               (SELECT max(r.last_used_time) FROM residencies r WHERE r.model_id = m.id))) AS last_used
    FROM models m WHERE m.files_path = f.path) u
WHERE f.doom_time IS NULL AND (%(path)s::text IS NULL OR f.path = %(path)s)
ORDER BY f.path
"""
MODEL_PREPARED = "UPDATE models SET last_used_time = registry_now() WHERE id = %(id)s"
# Written lazily: a lease must not wait for the model's row.
MODELS_NOTE_USE = """
UPDATE models m SET last_used_time = used.time
FROM (
    SELECT m.id, r.time FROM models m JOIN (
        SELECT model_id, max(last_used_time) AS time FROM residencies
        WHERE last_used_time > registry_now() - make_interval(secs => %(since_s)s) GROUP BY model_id
    ) r ON r.model_id = m.id
    WHERE m.last_used_time IS NULL OR m.last_used_time < r.time
    FOR UPDATE OF m SKIP LOCKED
) used
WHERE m.id = used.id
"""
# Files of the same commit that another model, of another quantization, is loaded or was made from.
BASE_FIND = """
SELECT f.path FROM models m
JOIN store_folders f ON f.path = CASE WHEN m.quantization = 'NONE' THEN m.files_path ELSE m.base_path END
WHERE m.id <> %(model_id)s AND m.state = 'READY' AND f.doom_time IS NULL
  AND m.source_kind = %(source_kind)s AND m.commit_sha = %(commit_sha)s
  AND (m.source_kind = 'gguf' OR m.location = %(location)s)
  AND (m.quantization <> 'NONE' OR %(quantization)s <> 'NONE')
ORDER BY m.create_time, m.id LIMIT 1 FOR SHARE OF f
"""
BASE_TAKE = "UPDATE preparations SET source_path = %(path)s WHERE model_id = %(model_id)s"
