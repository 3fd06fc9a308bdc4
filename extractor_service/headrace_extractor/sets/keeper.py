"""Keeps the sets of a node within their limits: reserves room, evicts, deletes what the registry orders.

What goes is decided in `cache.py`. A set that goes is first taken off the registry's list, which refuses while it is
pinned; then it is moved to the trash in one step, and removed there. Nothing is awaited between the last look at who
uses it and that step, so whoever comes finds the set whole or gone. While the registry is away, what was pinned when
last heard stays.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import DiskFull
from headrace_extractor.sets import eviction as cache
from headrace_extractor.sets.eviction import CachedSet, Disk, Limits
from headrace_extractor.sets.notes import HeldSet, SetNotes, SetOrders, note_use
from headrace_extractor.sets.ports import SetRegistry
from headrace_log import retention
from headrace_log.errors import LogError
from headrace_log.holding import nobody_holds
from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

TRASH_NAME = ".trash"
WINDOW_MARK = ".window-"
# Deletions and pins are for people: a few seconds are soon.
POLL_S = 3.0
# Sets in use are noted as used this often, so that a crash loses no more of their last use.
USE_NOTE_S = 60.0
_MAX_ROUNDS = 100
# What is called otherwise is not ours to remove.
_OF_A_SET = re.compile(rf"[0-9a-f]{{32}}({re.escape(WINDOW_MARK)}.*)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Room an extraction was given: rows of columns, or a window of so many bytes."""

    folder: Path
    columns: tuple[str, ...]
    n_rows: int
    window_bytes: int


class SetKeeper:
    """Implements the port Room. `held` are the folders that must stay now; `epoch` is the node's."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        *,
        registry: SetRegistry,
        held: Callable[[], AbstractSet[Path]],
        epoch: Callable[[], int],
    ) -> None:
        self._folder = folder
        self._limits = limits
        self._registry = registry
        self._held = held
        self._epoch = epoch
        self._heard: dict[Path, SetOrders] = {}
        self._promises: dict[str, Promise] = {}
        self._deciding = asyncio.Lock()

    # -- Room ---------------------------------------------------------------------------------------------------------

    async def reserve(
        self, holder: str, folder: Path, *, columns: Sequence[str], n_rows: int, window_bytes: int = 0
    ) -> None:
        """Keeps room for so many rows of a set (or a window) until `release`; evicts what it must. Raises DiskFull."""
        promise = Promise(folder=folder, columns=tuple(columns), n_rows=n_rows, window_bytes=window_bytes)
        async with self._deciding:
            await self._clear({**self._promises, holder: promise}, promise)
            self._promises[holder] = promise

    async def fits(self, folder: Path, *, columns: Sequence[str], n_rows: int) -> bool:
        """True if so many rows of a set have room now, beside everything that is there and promised."""
        promise = Promise(folder=folder, columns=tuple(columns), n_rows=n_rows, window_bytes=0)
        sets, disk = await self._look({**self._promises, "": promise})
        return not cache.excess_bytes(sets, self._limits, disk)

    def release(self, holder: str) -> None:
        """Gives back what a holder reserved and did not use."""
        if promise := self._promises.pop(holder, None):
            self.used(promise.folder)

    async def make_room(self, required_bytes: int) -> bool:
        """The disk filled up while a set was written: evicts others; False if there was nothing to evict."""
        async with self._deciding:
            sets, disk = await self._look(self._promises)
            wanted = max(cache.excess_bytes(sets, self._limits, disk), required_bytes)
            gone = [await self._evict(each, "the disk is full") for each in cache.victims(sets, wanted)]
        return any(gone)

    def used(self, folder: Path) -> None:
        """Notes that somebody uses the set now."""
        note_use(folder)

    async def available_bytes(self, folder: Path) -> int:
        """Bytes that could be added to the set in `folder` now, what may be evicted counted."""
        sets, disk = await self._look(self._promises)
        others = [replace(each, held=True) if each.folder == folder else each for each in sets]
        return cache.available_bytes(others, self._limits, disk)

    # -- life ---------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Removes what a crash left: trash, and folders that are no set and that no extraction has."""
        shutil.rmtree(self._folder / TRASH_NAME, ignore_errors=True)
        held = self._held()
        for folder in self._folders():
            orphaned = WINDOW_MARK in folder.name or not (folder / "manifest.json").exists()
            if orphaned and folder not in held:
                shutil.rmtree(folder, ignore_errors=True)
        # A disk that is full by the time it is wanted has no room for a folder.
        (self._folder / TRASH_NAME).mkdir(exist_ok=True)

    async def run(self) -> None:
        """Follows the registry's orders and keeps the limits, until cancelled."""
        noted = 0.0
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.follow_orders()
                if time.monotonic() - noted >= USE_NOTE_S:
                    noted = time.monotonic()
                    await self.keep_limits()
            except ServiceError as exc:
                logger.info("the registry has no orders for sets now: %s", exc.message)
            except (OSError, LogError):
                logger.exception("sets can't be looked after; it is tried again")

    async def follow_orders(self) -> None:
        """Asks the registry what it wants of the sets here, notes it, and removes what shall go."""
        orders = await self._registry.set_orders()
        for folder in self._folders():
            if order := orders.get(folder.name):
                await self.heard(folder, order)

    async def heard(self, folder: Path, order: SetOrders) -> None:
        """Notes what the registry wants of one set; one that shall go does so once nobody uses it."""
        if self._heard.get(folder) != order:
            await asyncio.to_thread(_note_pin, folder, order)
            self._heard[folder] = order
        if order.delete and await self._remove(folder, "it was deleted"):
            await self._registry.report_set(self._epoch(), HeldSet.gone(folder.name, folder))

    async def keep_limits(self) -> None:
        """Notes what is in use; evicts what nobody has used for long, and what is over the quota."""
        for folder in self._held():
            note_use(folder)
        async with self._deciding:
            sets, disk = await self._look(self._promises)
            for each in cache.unused(sets, self._limits, time.time()):
                await self._evict(each, "nobody has used it for long")
            sets, disk = await self._look(self._promises)
            excess = cache.excess_bytes(sets, self._limits, disk)
            for each in cache.victims(sets, excess):
                await self._evict(each, "the sets are over their quota")

    # -- eviction -----------------------------------------------------------------------------------------------------

    async def _clear(self, promises: Mapping[str, Promise], wanted: Promise) -> None:
        """Evicts until all promises fit; raises DiskFull if they can't."""
        for _ in range(_MAX_ROUNDS):
            sets, disk = await self._look(promises)
            excess = cache.excess_bytes(sets, self._limits, disk)
            if not excess:
                return
            chosen = cache.victims(sets, excess)
            if sum(each.size_bytes for each in chosen) < excess:
                raise self._no_room(sets, disk, wanted)
            for each in chosen:
                await self._evict(each, "room is wanted")
        raise self._no_room(sets, disk, wanted)

    async def _evict(self, victim: CachedSet, why: str) -> bool:
        held = HeldSet.gone(victim.set_id, victim.folder)
        try:
            order = await self._registry.report_set(self._epoch(), replace(held, deleted=False), evict=True)
        except ServiceError as exc:  # What was pinned when last heard is no victim.
            logger.info("set %s goes unasked: %s", victim.set_id, exc.message)
        else:
            if order.pinned:
                await self.heard(victim.folder, order)
                return False
        return await self._remove(victim.folder, why)

    async def _remove(self, folder: Path, why: str) -> bool:
        """Removes a set unless somebody has come to use it."""
        if folder in self._held():
            return False
        self._heard.pop(folder, None)
        try:
            with nobody_holds(folder) as free:
                if not free:
                    return False
                thrown = retention.throw_away(folder, self._folder / TRASH_NAME)
        except FileNotFoundError:
            return False
        await asyncio.to_thread(shutil.rmtree, thrown, ignore_errors=True)
        logger.info("set %s was removed: %s", folder.name, why)
        return True

    def _no_room(self, sets: Sequence[CachedSet], disk: Disk, wanted: Promise) -> DiskFull:
        own = next(each for each in sets if each.folder == wanted.folder)
        needed = max(own.promised_bytes - own.sealed_bytes, 0)
        others = [replace(each, held=True, promised_bytes=0, peak_bytes=0) if each is own else each for each in sets]
        free = cache.available_bytes(others, self._limits, disk)
        most = cache.most_bytes(self._limits, disk)
        kept = sum(each.held or each.pinned for each in sets if each is not own)
        metadata = {
            "required_bytes": str(needed),
            "free_bytes": str(free),
            "quota_bytes": str(self._limits.quota_bytes),
            "most_bytes": str(most),
            "kept_sets": str(kept),
        }
        if own.promised_bytes > most:
            remedy = (
                f"it never fits, the most there can be is {most}: ask for fewer rows or hookpoints or a smaller "
                "storage dtype, use WINDOW, or raise --sets-quota-bytes"
            )
        else:
            remedy = (
                f"{kept} sets are pinned or in use: wait for them, unpin or delete some (`headrace sets list`), free "
                "space on the disk, or raise --sets-quota-bytes"
            )
        message = f"The rows take {needed} bytes more, and there is room for {free}; {remedy}."
        return DiskFull(message, metadata=metadata)

    # -- what there is ------------------------------------------------------------------------------------------------

    async def _look(self, promises: Mapping[str, Promise]) -> tuple[list[CachedSet], Disk]:
        held = self._held() | {promise.folder for promise in promises.values()}
        return await asyncio.to_thread(self._survey, held, tuple(promises.values()))

    def _survey(self, held: AbstractSet[Path], promises: Sequence[Promise]) -> tuple[list[CachedSet], Disk]:
        now = time.time()
        sets = [
            _cached_set(folder, [p for p in promises if p.folder == folder], held=folder in held, now=now)
            for folder in sorted({*self._folders(), *held})
        ]
        stats = os.statvfs(self._folder)
        disk = Disk(total_bytes=stats.f_blocks * stats.f_frsize, free_bytes=stats.f_bavail * stats.f_frsize)
        return sets, disk

    def _folders(self) -> Iterable[Path]:
        return [path for path in self._folder.iterdir() if _OF_A_SET.fullmatch(path.name) and path.is_dir()]


def _cached_set(folder: Path, promises: Sequence[Promise], *, held: bool, now: float) -> CachedSet:
    sealed, opened = retention.sizes(folder)
    notes = SetNotes.load(folder)
    in_the_end, at_most = _promised(folder, promises)
    return CachedSet(
        folder=folder,
        set_id=folder.name.partition(WINDOW_MARK)[0],
        size_bytes=sealed + opened,
        sealed_bytes=sealed,
        promised_bytes=in_the_end,
        peak_bytes=at_most,
        last_used=notes.last_used,
        held=held or WINDOW_MARK in folder.name or _is_mapped(folder),
        pinned=SetOrders(pinned=notes.pinned, pinned_until=notes.pinned_until).pinned_at(now),
    )


def _is_mapped(folder: Path) -> bool:
    with nobody_holds(folder) as free:
        return not free


def _note_pin(folder: Path, order: SetOrders) -> None:
    notes = SetNotes.load(folder)
    if (order.pinned, order.pinned_until) != (notes.pinned, notes.pinned_until):
        replace(notes, pinned=order.pinned, pinned_until=order.pinned_until).save(folder)


def _promised(folder: Path, promises: Sequence[Promise]) -> tuple[int, int]:
    """What a set will take in the end and at most; a window never takes more than it may."""
    if not promises:
        return 0, 0
    try:
        manifest, index = Manifest.load(folder), SegmentIndex.load(folder)
    except FileNotFoundError:
        return 0, 0
    sizes = cache.promised(manifest, index, [(promise.columns, promise.n_rows) for promise in promises])
    window_bytes = max(promise.window_bytes for promise in promises)
    if not window_bytes:
        return sizes
    known = all(promise.n_rows for promise in promises)
    return (min(sizes[0], window_bytes), min(sizes[1], window_bytes)) if known else (window_bytes, window_bytes)
