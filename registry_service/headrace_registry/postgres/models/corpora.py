"""Corpora in Postgres: which node holds which documents, so that one id names the same ones everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from headrace_registry.errors import AlreadyExists
from headrace_registry.postgres.residency.nodes import hear
from headrace_registry.postgres.server.pool import Connection, Database

# Nodes that report one id at the same time wait for each other.
CORPUS_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%(id)s, 3))"
# A node that was not heard for a day keeps no id from others: it may never come back.
CORPUS_OTHER = """
SELECT c.node_id, c.digest FROM corpora c JOIN nodes n ON n.id = c.node_id
WHERE c.id = %(id)s AND c.node_id <> %(node_id)s AND c.digest <> %(digest)s
  AND n.heartbeat_time > registry_now() - interval '1 day'
ORDER BY c.node_id LIMIT 1
"""
CORPUS_UPSERT = """
INSERT INTO corpora (id, node_id, digest) VALUES (%(id)s, %(node_id)s, %(digest)s)
ON CONFLICT (id, node_id) DO UPDATE SET digest = excluded.digest, update_time = registry_now()
"""
CORPORA_REPLACE = """
WITH held AS (
    SELECT * FROM unnest(%(ids)s::text[], %(digests)s::text[]) AS held (id, digest)
), gone AS (
    DELETE FROM corpora WHERE node_id = %(node_id)s AND NOT id = ANY(%(ids)s)
)
INSERT INTO corpora (id, node_id, digest) SELECT id, %(node_id)s, digest FROM held
ON CONFLICT (id, node_id) DO UPDATE SET digest = excluded.digest, update_time = registry_now()
"""


class CorpusStore:
    """Writes for ReportCorpora."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, node_id: str, epoch: int, digests: Mapping[str, str]) -> None:
        """Notes that the node is about to hold these. Raises AlreadyExists if an id names other documents elsewhere."""

        async def work(conn: Connection) -> None:
            await hear(conn, node_id, epoch)
            for corpus_id, digest in sorted(digests.items()):
                values = {"id": corpus_id, "node_id": node_id, "digest": digest}
                await conn.execute(CORPUS_LOCK, values)
                other = await (await conn.execute(CORPUS_OTHER, values)).fetchone()
                if other is not None:
                    raise AlreadyExists(
                        f"node {other['node_id']} holds other documents as corpus {corpus_id!r} (digest "
                        f"{other['digest'][:12]}…, these have {digest[:12]}…); choose another id, or remove that one "
                        f"with `headrace corpora rm {corpus_id}`",
                        metadata={"node_id": other["node_id"], "digest": other["digest"]},
                        resource=("corpus", corpus_id),
                    )
                await conn.execute(CORPUS_UPSERT, values)

        await self._database.run(work)

    async def replace(self, node_id: str, epoch: int, digests: Mapping[str, str]) -> None:
        """Replaces all that is known of the node's corpora."""

        async def work(conn: Connection) -> None:
            await hear(conn, node_id, epoch)
            values = {"node_id": node_id, "ids": list(digests), "digests": list(digests.values())}
            await conn.execute(CORPORA_REPLACE, values)

        await self._database.run(work)
