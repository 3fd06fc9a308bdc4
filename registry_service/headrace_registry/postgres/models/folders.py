"""Folders of the model store in Postgres: which models need each, and which are to be removed.

A folder is doomed once it is to be removed: no model becomes READY with it, and its files go at the next chance. Its
row is written before the folder is made, and a model forgets its files before they are removed: after a kill at any
moment the rows tell what is left to do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_registry.models.eviction import StoredFolder, plan_eviction
from headrace_registry.models.folders import ModelFolders, Partial
from headrace_registry.models.models import ModelState
from headrace_registry.postgres import statements
from headrace_registry.postgres.models.models import change_model, lock_model
from headrace_registry.postgres.models.preparations import hold_claim
from headrace_registry.postgres.server.pool import Connection, Database
from headrace_registry.wakeups import Wakeups

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
# A node may still be writing a folder that was given up: its files are removed too if they come within the hour.
FOLDERS_FORGET = """
DELETE FROM store_folders WHERE path = ANY(%(paths)s) AND doom_time < registry_now() - interval '1 hour'
"""
FOLDERS_WANTED = "SELECT target_path FROM preparations WHERE target_path <> ''"
# In use: loaded or on its way to a device, also on a node that may come back, pinned, in preparation, or registered as
# a source itself.
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

GGUF_SOURCES = "SELECT DISTINCT location FROM models WHERE source_kind = 'gguf' AND files_path <> ''"

log = logging.getLogger(__name__)

_REMOVED_AT_ONCE = 100
_ORPHANS_AT_ONCE = 1000
_MAX_DECISIONS = 5
# As long as FOLDERS_FORGET keeps a doomed folder: a node may still write to it, with pauses shorter than this.
_LEFTOVER_S = 3600.0


class _VictimInUse(Exception):
    """A folder chosen for removal came into use before it could be locked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """The disk as it was before a decision, which takes no look at it: walking a large store takes its time."""

    sizes: Mapping[str, int]
    free_bytes: int
    sources: frozenset[str]  # GGUF files that exist.
    partials: Sequence[Partial]


class FolderStore:
    """Reads and writes for the storekeeper, and the removals on the disk that belong to them."""

    def __init__(self, database: Database, wakeups: Wakeups, folders: ModelFolders, *, quota_bytes: int) -> None:
        self._database = database
        self._wakeups = wakeups
        self._folders = folders
        self._quota_bytes = quota_bytes
        self._surveying = asyncio.Lock()  # One walk at a time: they would only slow each other down.

    async def evict_and_reserve(
        self, model_id: str, worker: str, *, path: str, total_bytes: int, make: bool
    ) -> list[str]:
        """Reserves space for a folder, and makes it if told.

        Returns the models that lost their files for it. Raises DiskFull, ClaimLost.
        """

        async def work(conn: Connection) -> list[str]:
            await conn.execute(statements.STORE_LOCK)
            await hold_claim(conn, model_id, worker)
            row = await (await conn.execute(FOLDER_IS_DOOMED, {"path": path})).fetchone()
            if row is not None and row["doomed"]:  # It may be half removed: the rest goes before it is made anew.
                await asyncio.to_thread(self._folders.discard, path, partials=survey.partials)
            victims = plan_eviction(
                await _folders(conn, survey),
                survey.sizes,
                target=path,
                total_bytes=total_bytes,
                quota_bytes=self._quota_bytes,
                free_bytes=survey.free_bytes,
            )
            for victim in victims:
                await _take_away(conn, survey, victim, f"files removed to make room for {model_id}")
            values = {"path": path, "model_id": model_id, "reserved_bytes": total_bytes}
            await conn.execute(FOLDER_UPSERT, values)
            return [each for victim in victims for each in victim.models]

        survey = await self._survey()
        for n_left in reversed(range(_MAX_DECISIONS)):
            try:
                removed = await self._database.run(work)
                break
            except _VictimInUse:
                if not n_left:
                    raise
        if make:  # Its row is there, so that a kill in between leaves no folder that is not ours.
            await asyncio.to_thread(self._folders.make, path)
        self._wakeups.wake()
        return removed

    async def _survey(self) -> _Survey:
        async def work(conn: Connection) -> list[str]:
            return [row["location"] for row in await (await conn.execute(GGUF_SOURCES)).fetchall()]

        async with self._surveying:
            sources = await self._database.single(work)
            return _Survey(
                sizes=await asyncio.to_thread(self._folders.sizes),
                free_bytes=await asyncio.to_thread(self._folders.free_bytes),
                partials=await asyncio.to_thread(self._folders.partials),
                sources=frozenset(await asyncio.to_thread(lambda: [each for each in sources if Path(each).is_file()])),
            )

    async def remove_doomed(self) -> None:
        """Removes doomed folders from the disk, and forgets a folder an hour after it was doomed."""

        async def work(conn: Connection) -> None:
            rows = await (await conn.execute(FOLDERS_DOOMED, {"limit": _REMOVED_AT_ONCE})).fetchall()
            paths = [row["path"] for row in rows if self._folders.owns(row["path"])]
            await asyncio.to_thread(self._folders.discard, *paths, partials=partials)
            await conn.execute(FOLDERS_FORGET, {"paths": paths})

        partials = await asyncio.to_thread(self._folders.partials)
        await self._database.run(work)

    async def discard_leftovers(self) -> None:
        """Removes partial folders that killed builds left on the disk and that no preparation wants."""

        async def work(conn: Connection) -> list[str]:
            rows = await (await conn.execute(FOLDERS_WANTED)).fetchall()
            return [row["target_path"] for row in rows]

        wanted = await self._database.run(work)
        await asyncio.to_thread(self._folders.discard_leftovers, wanted, untouched_s=_LEFTOVER_S)

    async def doom_unused(self, path: str) -> None:
        """Dooms a folder unless a model loads from it or a preparation needs it."""

        async def work(conn: Connection) -> None:
            await conn.execute(statements.STORE_LOCK)
            await conn.execute(FOLDER_DOOM_UNUSED, {"path": path})

        await self._database.run(work)

    async def doom_orphans(self) -> list[str]:
        """Dooms folders of models that were deleted, as after a kill; returns their paths."""

        async def work(conn: Connection) -> list[str]:
            await conn.execute(statements.STORE_LOCK)
            rows = await conn.execute(FOLDERS_DOOM_ORPHANS, {"limit": _ORPHANS_AT_ONCE})
            return [row["path"] for row in await rows.fetchall()]

        orphans = await self._database.run(work)
        if orphans:
            log.info("%d folders whose models are gone are removed", len(orphans))
        return orphans

    async def note_use(self, *, since_s: float) -> None:
        """Copies into the models when they were last used, from residencies used in the last `since_s` seconds."""

        async def work(conn: Connection) -> None:
            await conn.execute(MODELS_NOTE_USE, {"since_s": since_s})

        await self._database.run(work)


async def _folders(conn: Connection, survey: _Survey, path: str | None = None) -> list[StoredFolder]:
    rows = await (await conn.execute(FOLDERS, {"path": path})).fetchall()
    return [
        StoredFolder(
            path=row["path"],
            models=tuple(row["models"]),
            # Without its source a converted folder could not be made again.
            in_use=row["in_use"] or not survey.sources.issuperset(row["gguf"]),
            reserved_bytes=row["reserved_bytes"],
            last_used=row["last_used"],
        )
        for row in rows
    ]


async def _take_away(conn: Connection, survey: _Survey, victim: StoredFolder, reason: str) -> None:
    """Makes a folder's models REGISTERED again and dooms the folder. Raises _VictimInUse if it came into use."""
    for model_id in victim.models:
        await lock_model(conn, model_id)
    if [(each.models, each.in_use) for each in await _folders(conn, survey, victim.path)] != [(victim.models, False)]:
        raise _VictimInUse
    for model_id in victim.models:
        await change_model(conn, model_id, reason, {"state": ModelState.REGISTERED, "files_path": "", "store_bytes": 0})
    await conn.execute(FOLDER_DOOM, {"path": victim.path})
