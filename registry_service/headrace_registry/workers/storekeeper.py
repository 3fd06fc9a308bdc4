"""Keeps the model store within its quota: evicts files before others are written, removes folders out of use."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from headrace_registry.models.folders import ModelFolders, tree_bytes
from headrace_registry.postgres.models.folders import FolderStore
from headrace_registry.workers.rounds import FailureCount, attempt, uncounted

log = logging.getLogger(__name__)

_TICK_S = 2.0
# Uses decide only which files go first, and ten seconds make no difference there.
_NOTE_EVERY_TICKS = 5
# Much longer than ten seconds: a late or failed round leaves its uses to the next. A start looks back over everything.
_LOOK_BACK_S = 600.0
_FOR_EVER_S = 10.0 * 365 * 86400


class Storekeeper:
    """The worker of one registry process. `run` it beside the server."""

    def __init__(self, store: FolderStore, folders: ModelFolders, *, failed: FailureCount = uncounted) -> None:
        self.folders = folders
        self._store = store
        self._failed = failed

    async def reserve_space(
        self, model_id: str, worker: str, *, path: str, total_bytes: int, make: bool = True
    ) -> None:
        """Reserves disk space for a folder, evicting other files if needed; makes the folder unless `make` is False.

        Raises DiskFull if too little can be evicted, and ClaimLost.
        """
        # Before the decision, which counts bytes on the disk; and after, so that the bytes evicted are free.
        await self._remove_doomed()
        lost = await self._store.evict_and_reserve(model_id, worker, path=path, total_bytes=total_bytes, make=make)
        if lost:
            log.info("files of %s evicted for those of %s", ", ".join(lost), model_id)
        await self._remove_doomed()

    async def bytes_of(self, path: str) -> int:
        """Bytes of a folder in the store; 0 for folders elsewhere."""
        return await asyncio.to_thread(tree_bytes, Path(path)) if self.folders.owns(path) else 0

    async def remove_unused(self, path: str) -> None:
        """Has a folder removed in a later round, unless a model loads from it or a preparation needs it."""
        await self._store.doom_unused(path)

    async def run(self) -> None:
        """Runs until cancelled."""
        started, round_number = False, 0
        while True:
            if not started:
                everything = partial(self._store.note_use, since_s=_FOR_EVER_S)
                started = await attempt("store-orphans", self._store.doom_orphans, self._failed)
                started &= await attempt("store-uses", everything, self._failed)
            if round_number % _NOTE_EVERY_TICKS == 0:
                await attempt("store-uses", partial(self._store.note_use, since_s=_LOOK_BACK_S), self._failed)
                await attempt("store-leftovers", self._store.discard_leftovers, self._failed)
            await attempt("store-doomed", self._remove_doomed, self._failed)
            round_number += 1
            await asyncio.sleep(_TICK_S)

    async def _remove_doomed(self) -> None:
        await self._store.remove_doomed()
        await asyncio.to_thread(self.folders.empty_trash)
