"""Statements about residency events: written by whoever moves a residency, numbered by whoever reads them."""

from __future__ import annotations

from headrace_registry.postgres.statements import RESIDENCY_IN_FULL

# Conflicts with other publishers only, and takes no snapshot: what is read after it is of after the wait.
LOG_LOCK = "LOCK TABLE residency_log IN EXCLUSIVE MODE"
# For a snapshot and its `seq` of one moment; before any other statement.
ONE_MOMENT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
LOG_HEAD = """
SELECT head, EXISTS (SELECT 1 FROM residency_events WHERE seq IS NULL) AS unpublished,
       (SELECT COALESCE(min(seq), head + 1) FROM residency_events) AS first, registry_now() AS now
FROM residency_log
"""
PUBLISH = """
WITH numbered AS (
    SELECT e.id, l.head + row_number() OVER (ORDER BY e.id) AS seq
    FROM residency_events e CROSS JOIN residency_log l WHERE e.seq IS NULL
), published AS (
    UPDATE residency_events e SET seq = n.seq FROM numbered n WHERE e.id = n.id
)
UPDATE residency_log SET head = head + (SELECT count(*) FROM numbered)
"""
EVENTS_AFTER = """
SELECT seq, time, residency FROM residency_events
WHERE seq > %(after_seq)s AND seq <= %(upto_seq)s AND (%(model_id)s = '' OR model_id = %(model_id)s)
ORDER BY seq LIMIT %(limit)s
"""
TRIM = "DELETE FROM residency_events WHERE seq <= (SELECT head FROM residency_log) - %(keep)s"
# What did not change the state: the row keeps the reason of its last transition.
NOTE_OF_MODEL = (
    """
INSERT INTO residency_events (residency_id, model_id, state, reason, actor, residency)
SELECT r.id, r.model_id, r.state, %(reason)s, %(actor)s,
       to_jsonb(r) || jsonb_build_object('reason', %(reason)s::text, 'actor', %(actor)s::text)
FROM ("""
    + RESIDENCY_IN_FULL
    + """
    WHERE r.model_id = %(model_id)s AND (%(node_id)s = '' OR r.node_id = %(node_id)s)
      AND r.state NOT IN ('UNLOADED', 'FAILED', 'LOST')) r
ORDER BY r.create_time, r.id
"""
)
