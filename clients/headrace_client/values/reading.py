"""Which rows a reader gets, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from headrace_client.errors import InvalidArgument
from headrace_client.values.common import choice
from headrace_client.values.outliers import NormLimit
from headrace_log.order import DEFAULT_BLOCK_ROWS, Sequential, Shard


class ReadOrder(StrEnum):
    """SHUFFLED begins once the extraction has all its rows, and is refused for WINDOW sets."""

    SEQUENTIAL = "sequential"
    SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Order and shard of a stream. Rows within a block of `block_rows` stay together; 0 stands for 1024.

    A SHUFFLED order follows from `seed` and `epoch`; a stream of several epochs counts on from `epoch`. `shard` (i, n)
    is every n-th block of the order from the i-th on: (rank, world) for data-parallel ranks. All shards have the same
    number of whole blocks; blocks left over belong to no shard. For batches only: `mix_blocks` mixes rows within
    windows of so many blocks, by `seed`; `norm_limit` leaves out rows that are too long.
    """

    order: ReadOrder | str = ReadOrder.SEQUENTIAL
    seed: int = 0
    epoch: int = 0
    shard: tuple[int, int] = (0, 1)
    block_rows: int = 0
    mix_blocks: int = 0
    norm_limit: NormLimit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", choice(ReadOrder, str(self.order), "order"))
        index, count = self.shard
        if not 0 <= index < count:
            raise InvalidArgument(
                f"shard is (i, n) with i from 0 to n - 1, not {self.shard}", fields={"shard": str(self.shard)}
            )
        for name, value, limit in (("seed", self.seed, 1 << 64), ("epoch", self.epoch, 1 << 63)):
            if not 0 <= value < limit:
                raise InvalidArgument(f"{name} is {value}; it is from 0 to {limit - 1}", fields={name: str(value)})
        for name, value, zero in (
            ("block_rows", self.block_rows, "1024"),
            ("mix_blocks", self.mix_blocks, "no mixing"),
        ):
            if value < 0:
                raise InvalidArgument(f"{name} is at least 1, or 0 for {zero}, not {value}", fields={name: str(value)})

    @property
    def plain(self) -> bool:
        """True where places are row numbers."""
        return self.order is ReadOrder.SEQUENTIAL and self.shard[1] == 1

    @property
    def rows_in_block(self) -> int:
        """Rows in a block."""
        return self.block_rows or DEFAULT_BLOCK_ROWS

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON, for states: readings with the same identity bring the same row of a set at the same place."""
        return {
            "order": str(self.order),
            "seed": self.seed,
            "first_epoch": self.epoch,
            "shard": list(self.shard),
            "block_rows": 0 if self.plain and not self.mix_blocks else self.rows_in_block,
            "mix_blocks": self.mix_blocks,
        }

    def in_epoch(self, epoch: int) -> Self:
        """The same reading for another epoch; sequential rows have the same order in each epoch."""
        return replace(self, epoch=epoch) if self.order is ReadOrder.SHUFFLED else self

    def first_row_needed(self, place: int) -> int:
        """The first row that a sequential reader at `place` still needs."""
        if self.plain:
            return place
        return Sequential(block_rows=self.rows_in_block, shard=Shard(*self.shard)).stretch(place).row

    def fields(self) -> dict[str, Any]:
        """As fields of a StreamActivations request; empty where places are row numbers."""
        if self.plain:
            return {}
        return {
            "order": f"READ_ORDER_{self.order.upper()}",
            "seed": self.seed,
            "epoch": self.epoch,
            "shard_index": self.shard[0],
            "shard_count": self.shard[1],
            "block_rows": self.block_rows,
        }


PLAIN = Reading()
