"""Reading orders: which row stands at which place. Pure functions; `docs/reading.md` has the algorithms.

A reading order is made of blocks of `block_rows` rows, each read front to back. A shard has every n-th block of it.
Places are counted from 0 within the rows that one reader gets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_BLOCK_ROWS = 1024
# Each round swaps about half of all pairs of blocks; after 64 rounds nothing is left of the order before.
_ROUNDS = 64
_PAGE = 256  # Slots computed at once: one pass of numpy costs the same for one slot as for hundreds.
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`; (0, 1) is the whole order."""

    index: int = 0
    count: int = 1


class Stretch(NamedTuple):
    """Rows `[row, row + n_rows)`, which follow one another in the reading order, within one block."""

    row: int
    n_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequential:
    """Blocks in the order of their rows; the number of rows need not be known."""

    block_rows: int
    shard: Shard

    def n_places(self, n_rows: int) -> int:
        """Returns how many places the first `n_rows` rows fill: with several shards only whole rounds of blocks."""
        if self.shard.count == 1:
            return n_rows
        return n_rows // (self.block_rows * self.shard.count) * self.block_rows

    def stretch(self, place: int) -> Stretch:
        """Returns the rows from `place` to the end of its block."""
        slot, offset = divmod(place, self.block_rows)
        row = (slot * self.shard.count + self.shard.index) * self.block_rows
        return Stretch(row + offset, self.block_rows - offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffled:
    """Blocks of `n_rows` rows in an order that depends on seed, epoch, block_rows and n_rows alone.

    A short last block takes part only if there is a single shard.
    """

    n_rows: int
    block_rows: int
    seed: int
    epoch: int
    shard: Shard

    @property
    def n_blocks(self) -> int:
        """Number of blocks that are permuted."""
        n_whole = self.n_rows // self.block_rows
        return n_whole + (self.shard.count == 1 and n_whole * self.block_rows < self.n_rows)

    @property
    def n_places(self) -> int:
        """Number of places that this reader has."""
        if self.shard.count == 1:
            return self.n_rows
        return self.n_blocks // self.shard.count * self.block_rows

    def stretch(self, place: int) -> Stretch:
        """Returns the rows from `place` to the end of its block."""
        slot, offset = self._slot(place)
        page, at = divmod(slot * self.shard.count + self.shard.index, _PAGE)
        row = int(_blocks(page, self.n_blocks, self._key)[at]) * self.block_rows
        return Stretch(row + offset, min(self.block_rows, self.n_rows - row) - offset)

    def _slot(self, place: int) -> tuple[int, int]:
        """Returns the block's number in this reader's order, and the offset of `place` within the block."""
        short = self.n_rows % self.block_rows
        if self.shard.count > 1 or not short:
            return divmod(place, self.block_rows)
        # The short block stands at slot `at`; the places behind it begin earlier by the rows that it lacks.
        at = slot_of(self.n_blocks - 1, self.n_blocks, self._key)
        before = at * self.block_rows
        if place < before:
            return divmod(place, self.block_rows)
        if place < before + short:
            return at, place - before
        slot, offset = divmod(place - before - short, self.block_rows)
        return at + 1 + slot, offset

    @property
    def _key(self) -> int:
        return shuffle_key("blocks", self.seed, self.epoch, self.block_rows, self.n_rows)


Order = Sequential | Shuffled


@lru_cache(maxsize=256)
def shuffle_key(purpose: str, *numbers: int) -> int:
    """Returns 64 bits of SHA-256 over a purpose and unsigned 64-bit numbers, all little-endian."""
    content = b"".join(number.to_bytes(8, "little") for number in numbers)
    return int.from_bytes(hashlib.sha256(f"headrace.{purpose}\n".encode() + content).digest()[:8], "little")


def permuted(slots: NDArray[np.uint64], n: int, key: int) -> NDArray[np.uint64]:
    """Maps `slots` by a permutation of `n` numbers: the swap-or-not shuffle (Hoang, Morris, Rogaway, 2012)."""
    return _swap(slots, n, _round_keys(key))


@lru_cache(maxsize=64)
def slot_of(number: int, n: int, key: int) -> int:
    """Returns the slot that `permuted` maps to `number`: every round is its own inverse."""
    return int(_swap(np.array([number], np.uint64), n, _round_keys(key)[::-1])[0])


def mixed_rows(n: int, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """Returns the order in which `n` rows of a mixing window are taken: by a keyed hash of their places in it."""
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
    """Returns the first outputs of SplitMix64 started at `key`."""
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(steps + np.array([key], np.uint64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the finalizer of SplitMix64; arithmetic modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=64)
def _blocks(page: int, n: int, key: int) -> NDArray[np.uint64]:
    """Returns the blocks in the slots of a page; cached, since a reader asks for one slot after the other."""
    return permuted(np.arange(page * _PAGE, min((page + 1) * _PAGE, n), dtype=np.uint64), n, key)
