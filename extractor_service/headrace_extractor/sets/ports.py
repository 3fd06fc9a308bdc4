"""What sets need from outside, each with a real implementation in a room and a fake in the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from headrace_extractor.sets.notes import HeldSet, SetOrders


class SetRegistry(Protocol):
    """Activation sets in the registry, as a node sees them. Every method may raise RegistryUnavailable."""

    async def report_set(self, epoch: int, held: HeldSet, *, evict: bool = False) -> SetOrders:
        """Tells what a set of this node holds; with `evict`, asks whether it may go. EpochStale."""

    async def set_orders(self) -> Mapping[str, SetOrders]:
        """What the registry wants of each set that it knows to be here, by id."""


class Room(Protocol):
    """Room on the disk for sets."""

    async def reserve(
        self, holder: str, folder: Path, *, columns: Sequence[str], n_rows: int, window_bytes: int = 0
    ) -> None:
        """Keeps room for so many rows of a set (or a window) until `release`; evicts what it must. Raises DiskFull."""

    async def fits(self, folder: Path, *, columns: Sequence[str], n_rows: int) -> bool:
        """True if so many rows of a set have room now, beside everything that is there and promised."""

    def release(self, holder: str) -> None:
        """Gives back what a holder reserved and did not use."""

    async def make_room(self, required_bytes: int) -> bool:
        """The disk filled up while a set was written: evicts others; False if there was nothing to evict."""

    def used(self, folder: Path) -> None:
        """Notes that somebody uses the set now."""
