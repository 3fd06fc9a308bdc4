"""Reading orders: which row stands at which place. Pure functions; `docs/reading.md` has the algorithms.

A reading order is made of blocks of `block_rows` rows, each read front to back. A shard has every n-th block of it.
Places are counted from 0 within what one reader gets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_BLOCK_ROWS = 1024
# Each round swaps about half of all pairs of blocks; after sixty-four nothing of the order they had is left.
_ROUNDS = 64
_PAGE = 256  # Slots that are worked out at once: one pass of numpy costs the same for one as for hundreds.
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`; (0, 1) is everything."""

    index: int = 0
    count: int = 1


class Stretch(NamedTuple):
    """Rows `[row, row + n_rows)` stand one after the other in the reading order, within one block."""

    row: int
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequential:
    """Blocks in the order of their rows; needs no knowledge of how many there will be."""

    block_rows: int
    shard: Shard

    def n_places(self, n_rows: int) -> int:
        """Places that a reader may have of the first `n_rows` rows: rounds of whole blocks, if there are shards."""
        if self.shard.count == 1:
            return n_rows
        return n_rows // (self.block_rows * self.shard.count) * self.block_rows

    def stretch(self, place: int) -> Stretch:
        """The rest of the block in which `place` lies."""
        slot, offset = divmod(place, self.block_rows)
        row = (slot * self.shard.count + self.shard.index) * self.block_rows
        return Stretch(row + offset, self.block_rows - offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffled:
    """Blocks of `n_rows` rows in an order that depends on seed, epoch, block_rows and n_rows alone.

    A last block that is short takes part if there is one shard, and is left out of more.
    """

    n_rows: int
    block_rows: int
    seed: int
    epoch: int
    shard: Shard

    @property
    def n_blocks(self) -> int:
        """Blocks that are permuted."""
        n_whole = self.n_rows // self.block_rows
        return n_whole + (self.shard.count == 1 and n_whole * self.block_rows < self.n_rows)

    @property
    def n_places(self) -> int:
        """Places that this reader has."""
        if self.shard.count == 1:
            return self.n_rows
        return self.n_blocks // self.shard.count * self.block_rows

    def stretch(self, place: int) -> Stretch:
        """The rest of the block in which `place` lies."""
        slot, offset = self._slot(place)
        row = self._block(slot * self.shard.count + self.shard.index) * self.block_rows
        return Stretch(row + offset, min(self.block_rows, self.n_rows - row) - offset)

    def _slot(self, place: int) -> tuple[int, int]:
        """Number of the block in this reader's order, and the place within it."""
        short = self.n_rows % self.block_rows
        if self.shard.count > 1 or not short:
            return divmod(place, self.block_rows)
        at = slot_of(self.n_blocks - 1, self.n_blocks, self._key)
        before = at * self.block_rows
        if place < before:
            return divmod(place, self.block_rows)
        if place < before + short:
            return at, place - before
        slot, offset = divmod(place - before - short, self.block_rows)
        return at + 1 + slot, offset

    def _block(self, slot: int) -> int:
        page, at = divmod(slot, _PAGE)
        return int(_blocks(page, self.n_blocks, self._key)[at])

    @property
    def _key(self) -> int:
        return shuffle_key("blocks", self.seed, self.epoch, self.block_rows, self.n_rows)


Order = Sequential | Shuffled


@lru_cache(maxsize=256)
def shuffle_key(purpose: str, *numbers: int) -> int:
    """64 bits of SHA-256 over a purpose and unsigned 64-bit numbers, all little-endian."""
    content = b"".join(number.to_bytes(8, "little") for number in numbers)
    return int.from_bytes(hashlib.sha256(f"headrace.{purpose}\n".encode() + content).digest()[:8], "little")


def permuted(slots: NDArray[np.uint64], n: int, key: int) -> NDArray[np.uint64]:
    """Where a permutation of `n` numbers takes `slots`: the swap-or-not shuffle (Hoang, Morris, Rogaway, 2012)."""
    return _swap(slots, n, _round_keys(key))


@lru_cache(maxsize=64)
def slot_of(number: int, n: int, key: int) -> int:
    """The slot that `permuted` takes to `number`: every round is its own inverse."""
    return int(_swap(np.array([number], np.uint64), n, _round_keys(key)[::-1])[0])


def mixed_rows(n: int, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """The order in which `n` rows of a mixing window are taken: by a keyed hash of their places in it."""
    key = np.uint64(shuffle_key("window", seed, epoch, window))
    return np.argsort(_mix(np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + key), kind="stable")


def _swap(numbers: NDArray[np.uint64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    count = np.uint64(n)
    for key in keys:
        partner = (key % count + count - numbers) % count
        decides = _mix(np.maximum(numbers, partner) ^ key) >> np.uint64(63)
        numbers = np.where(decides == 1, partner, numbers)
    return numbers


def _round_keys(key: int) -> NDArray[np.uint64]:
    """The first outputs of SplitMix64 started at `key`."""
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(steps + np.array([key], np.uint64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64; arithmetic modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=64)
def _blocks(page: int, n: int, key: int) -> NDArray[np.uint64]:
    """Blocks that stand in the slots of a page."""
    return permuted(np.arange(page * _PAGE, min((page + 1) * _PAGE, n), dtype=np.uint64), n, key)
