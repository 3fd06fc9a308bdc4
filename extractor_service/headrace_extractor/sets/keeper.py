"""Keeps the sets of a node within their limits: reserves space, evicts, and deletes at the registry's order.

`eviction.py` decides which sets go. A set that goes is first taken off the registry's list, which refuses while the
set is pinned; then its folder is moved to the trash in one step, and its files are removed there. Nothing is awaited
between the last check for users and that step, so a new user finds the set whole or not at all. While the registry
can't be reached, a set that was pinned by its last answer stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import DiskFull
from headrace_extractor.sets import eviction
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_extractor.sets.activation_sets import ActivationSets
from headrace_extractor.sets.eviction import CachedSet, Disk, Limits
from headrace_extractor.sets.idleness import Idleness
from headrace_extractor.sets.notes import HeldSet, SetNotes, SetOrders, note_use
from headrace_extractor.sets.ports import SetRegistry
from headrace_log import retention
from headrace_log.errors import DiskFull as DiskFullOfLog
from headrace_log.errors import LogError
from headrace_log.holding import nobody_holds

# Deletions and pins are made by people: they see the effect within a few seconds.
POLL_S = 3.0
# Sets in use are noted as used this often, so that a crash loses no more of their last use.
USE_NOTE_S = 60.0
# After the wall clock was set, times of last use can't be compared for a while.
CALM_S = 3600.0
# A crash costs the count of so many seconds.
_SAVE_IDLENESS_S = 600.0
# Each round evicts at least one set; a node has no use for more rounds than this.
_MAX_ROUNDS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Disk space an extraction was given: for rows of some columns of a set, or for a window of so many bytes."""

    set: ActivationSet
    columns: tuple[str, ...]
    n_rows: int
    window_bytes: int = 0


class SetKeeper:
    """Reserves, evicts and deletes. `epoch` is the node's epoch, which the registry wants with every report.

    `wall` is the clock of files; `monotonic` goes on evenly, only while the machine runs.
    """

    def __init__(
        self,
        sets: ActivationSets,
        limits: Limits,
        *,
        registry: SetRegistry,
        epoch: Callable[[], int],
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sets = sets
        self._limits = limits
        self._registry = registry
        self._epoch = epoch
        self._orders: dict[Path, SetOrders] = {}  # The registry's last word on each set on disk.
        self._reservations: dict[str, Reservation] = {}  # By holder.
        self._deciding = asyncio.Lock()
        self._wall, self._monotonic = wall, monotonic
        before = Idleness.load(sets.folder)
        self._idleness = replace(before, wall=0.0)
        self._counted_at = self._saved_at = monotonic()
        # The clock went back while no server ran. A jump ahead looks like a long pause, and does no harm.
        self._calm_until = monotonic() + CALM_S if wall() < before.wall else 0.0

    # -- space --------------------------------------------------------------------------------------------------------

    async def reserve(self, holder: str, wanted: Reservation) -> None:
        """Keeps space for `holder` until `release`; evicts sets if it must. Raises DiskFull."""
        async with self._deciding:
            reservations = {**self._reservations, holder: wanted}
            for _ in range(_MAX_ROUNDS):
                sets, disk = await self._look(reservations)
                excess = eviction.excess_bytes(sets, self._limits, disk)
                chosen = eviction.victims(sets, excess)
                if sum(each.size_bytes for each in chosen) < excess:
                    break
                if not excess:
                    self._reservations[holder] = wanted
                    return
                for each in chosen:
                    await self._evict(each, "another set needs its space")
            raise self._no_space(sets, disk, wanted)

    async def fits(self, wanted: Reservation) -> bool:
        """True if the disk has space for it now, beside the files and reservations of all other sets."""
        sets, disk = await self._look({**self._reservations, "": wanted})
        return not eviction.excess_bytes(sets, self._limits, disk)

    def release(self, holder: str) -> None:
        """Gives back the part of a holder's reservation that it did not use."""
        if reservation := self._reservations.pop(holder, None):
            reservation.set.note_use()

    async def free_space(self, required_bytes: int) -> bool:
        """Evicts sets because the disk filled up while a set was written; False if no set could go."""
        async with self._deciding:
            sets, disk = await self._look(self._reservations)
            wanted = max(eviction.excess_bytes(sets, self._limits, disk), required_bytes)
            gone = [await self._evict(each, "the disk is full") for each in eviction.victims(sets, wanted)]
        return any(gone)

    async def available_bytes(self, to: ActivationSet) -> int:
        """Bytes that could be added to a set now, bytes of sets that may be evicted included."""
        sets, disk = await self._look(self._reservations)
        others = [replace(each, held=True) if each.folder == to.folder else each for each in sets]
        return eviction.available_bytes(others, self._limits, disk)

    # -- life ---------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Removes the leftovers of a crash: trash, windows and sets without a manifest that no extraction has."""
        shutil.rmtree(self._sets.trash, ignore_errors=True)
        self._sets.create_folders()
        held = self._sets.held_folders()
        unfinished = [f for f in self._sets.retained_folders() if not (f / "manifest.json").exists()]
        for folder in (*self._sets.window_folders(), *unfinished):
            if folder not in held:
                shutil.rmtree(folder, ignore_errors=True)

    async def run(self) -> None:
        """Follows the registry's orders and keeps the limits, until cancelled."""
        noted = 0.0
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.follow_orders()
                if self._monotonic() - noted >= USE_NOTE_S:
                    noted = self._monotonic()
                    await self.keep_limits()
            except ServiceError as exc:
                logger.info("the registry's orders for sets could not be read: %s", exc.message)
            except (OSError, LogError):
                logger.exception("the sets could not be checked against their limits; the next check tries again")

    async def follow_orders(self) -> None:
        """Asks the registry for its orders about the sets on this node; follows them."""
        orders = await self._registry.set_orders()
        folders = self._sets.retained_folders()
        self._orders = {folder: order for folder, order in self._orders.items() if folder in folders}
        for folder in folders:
            if order := orders.get(folder.name):
                await self.follow_order(self._sets.retained(folder.name), order)

    async def follow_order(self, of: ActivationSet, order: SetOrders) -> None:
        """Notes a pin; removes a set that shall be deleted, unless the set is in use."""
        if self._orders.get(of.folder) != order:
            await asyncio.to_thread(_note_pin, of.folder, order)  # So that the pin outlives a restart.
            self._orders[of.folder] = order
        if order.delete and await self._remove(of, "it was deleted"):
            await self._registry.report_set(self._epoch(), HeldSet.gone(of.id, of.folder))

    async def keep_limits(self) -> None:
        """Notes which sets are in use; evicts sets that were not used for long, and sets over the quota.

        Evicts nothing for an hour after the wall clock was set.
        """
        for folder in self._sets.held_folders():
            note_use(folder, self._wall())
        async with self._deciding:
            sets, disk = await self._look(self._reservations)
            self._count_idleness(sets)
            if self._monotonic() < self._calm_until:
                return
            sets, disk = await self._look(self._reservations)
            for each in eviction.unused(sets, self._limits):
                await self._evict(each, "it was not used for long")
            sets, disk = await self._look(self._reservations)
            excess = eviction.excess_bytes(sets, self._limits, disk)
            for each in eviction.victims(sets, excess):
                await self._evict(each, "the sets are over their quota")

    def _count_idleness(self, sets: Sequence[CachedSet]) -> None:
        now, wall = self._monotonic(), self._wall()
        elapsed_s, self._counted_at = now - self._counted_at, now
        if self._idleness.jumped(elapsed_s=elapsed_s, wall=wall):
            logger.warning("the clock of this machine was set; no set is evicted for %.0f minutes", CALM_S / 60)
            self._calm_until = now + CALM_S
        last_used = {each.folder.name: each.last_used for each in sets}
        self._idleness = self._idleness.after(last_used, elapsed_s=elapsed_s, wall=wall)
        if now - self._saved_at >= _SAVE_IDLENESS_S:
            self._saved_at = now
            with contextlib.suppress(DiskFullOfLog):
                self._idleness.save(self._sets.folder)

    # -- eviction -----------------------------------------------------------------------------------------------------

    async def _evict(self, victim: CachedSet, why: str) -> bool:
        of = self._sets.retained(victim.folder.name)  # A window is never a victim.
        held = replace(HeldSet.gone(of.id, of.folder), deleted=False)
        try:
            order = await self._registry.report_set(self._epoch(), held, evict=True)
        except ServiceError as exc:  # A set that was pinned by the registry's last answer is no victim.
            logger.info("set %s is evicted without asking the registry: %s", of.id, exc.message)
        else:
            if order.pinned:
                await self.follow_order(of, order)
                return False
        return await self._remove(of, why)

    async def _remove(self, of: ActivationSet, why: str) -> bool:
        """Removes a set; False if a user has come since it was chosen."""
        if of.held:
            return False
        self._orders.pop(of.folder, None)
        try:
            with nobody_holds(of.folder) as free:
                if not free:
                    return False
                thrown = retention.throw_away(of.folder, self._sets.trash)
        except FileNotFoundError:
            return False
        await asyncio.to_thread(shutil.rmtree, thrown, ignore_errors=True)
        logger.info("set %s was removed: %s", of.id, why)
        return True

    def _no_space(self, sets: Sequence[CachedSet], disk: Disk, wanted: Reservation) -> DiskFull:
        own = next(each for each in sets if each.folder == wanted.set.folder)
        needed = max(own.promised_bytes - own.sealed_bytes, 0)
        others = [replace(each, held=True, promised_bytes=0, peak_bytes=0) if each is own else each for each in sets]
        free = eviction.available_bytes(others, self._limits, disk)
        most = eviction.most_bytes(self._limits, disk)
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

    # -- the sets on disk ---------------------------------------------------------------------------------------------

    async def _look(self, reservations: Mapping[str, Reservation]) -> tuple[list[CachedSet], Disk]:
        held = self._sets.held_folders() | {each.set.folder for each in reservations.values()}
        return await asyncio.to_thread(self._survey, held, tuple(reservations.values()))

    def _survey(self, held: AbstractSet[Path], reservations: Sequence[Reservation]) -> tuple[list[CachedSet], Disk]:
        """Measures all sets and the disk. Runs in a thread, so it makes no set's object."""
        now, sets, windows = self._wall(), [], set(self._sets.window_folders())
        for folder in sorted({*self._sets.retained_folders(), *windows, *held}):
            sealed, opened = retention.sizes(folder)
            notes = SetNotes.load(folder)
            in_the_end, at_most = _promised([each for each in reservations if each.set.folder == folder])
            is_held = folder in held or folder in windows
            if not is_held:
                with nobody_holds(folder) as free:  # Another process may, such as a client that maps its files.
                    is_held = not free
            cached = CachedSet(
                folder=folder,
                size_bytes=sealed + opened,
                sealed_bytes=sealed,
                promised_bytes=in_the_end,
                peak_bytes=at_most,
                last_used=notes.last_used,
                idle_s=self._idleness.idle_s(folder.name, notes.last_used),
                held=is_held,
                pinned=SetOrders(pinned=notes.pinned, pinned_until=notes.pinned_until).pinned_at(now),
            )
            sets.append(cached)
        stats = os.statvfs(self._sets.folder)
        disk = Disk(total_bytes=stats.f_blocks * stats.f_frsize, free_bytes=stats.f_bavail * stats.f_frsize)
        return sets, disk


def _note_pin(folder: Path, order: SetOrders) -> None:
    notes = SetNotes.load(folder)
    if (order.pinned, order.pinned_until) != (notes.pinned, notes.pinned_until):
        replace(notes, pinned=order.pinned, pinned_until=order.pinned_until).save(folder)


def _promised(reservations: Sequence[Reservation]) -> tuple[int, int]:
    """Bytes that a set with these reservations takes in the end and at most; a window stays within its bytes."""
    if not reservations:
        return 0, 0
    of, wants = reservations[0].set, [(each.columns, each.n_rows) for each in reservations]
    try:
        in_the_end, at_most = eviction.promised(of.manifest(), of.index(), wants)
    except FileNotFoundError:
        return 0, 0
    except (ServiceError, LogError) as exc:  # Damage of one set must not fail the extractions of all others.
        logger.warning("set %s reserves nothing, its files can't be read: %s", of.id, exc)
        return 0, 0
    window_bytes = max(each.window_bytes for each in reservations)
    if not window_bytes:
        return in_the_end, at_most
    if not all(each.n_rows for each in reservations):  # The corpus was not counted: it may fill the window.
        return window_bytes, window_bytes
    return min(in_the_end, window_bytes), min(at_most, window_bytes)
