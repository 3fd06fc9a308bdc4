"""In which order a stream's rows come, which part of them, and by which way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from headrace_client.errors import InvalidArgument
from headrace_client.values.choices import choice
from headrace_log.order import DEFAULT_BLOCK_ROWS, Sequential, Shard


class ReadOrder(StrEnum):
    """SHUFFLED begins once the extraction has all its rows, and is refused for WINDOW sets."""

    SEQUENTIAL = "sequential"
    SHUFFLED = "shuffled"


class Transport(StrEnum):
    """How rows travel: AUTO maps the set's files where this process sees the very folder that the server has."""

    AUTO = "auto"
    INLINE = "inline"
    MAPPED = "mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Order and shard of a stream. Rows within a block of `block_rows` stay together; 0 stands for 1024.

    Seed and epoch are for SHUFFLED. `shard` (i, n) is every n-th block of the order from the i-th on; all shards have
    the same number of whole blocks, and what is left over belongs to none of them.
    """

    order: ReadOrder = ReadOrder.SEQUENTIAL
    seed: int = 0
    epoch: int = 0
    shard: tuple[int, int] = (0, 1)
    block_rows: int = 0

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
        if self.block_rows < 0:
            raise InvalidArgument(
                "block_rows is at least 1, or 0 for 1024", fields={"block_rows": str(self.block_rows)}
            )

    @property
    def plain(self) -> bool:
        """True where places are row numbers."""
        return self.order is ReadOrder.SEQUENTIAL and self.shard[1] == 1

    @property
    def rows_in_block(self) -> int:
        """Rows in a block."""
        return self.block_rows or DEFAULT_BLOCK_ROWS

    def in_epoch(self, epoch: int) -> Self:
        """The same for another epoch; rows in sequence come in the same order in each."""
        return replace(self, epoch=epoch) if self.order is ReadOrder.SHUFFLED else self

    def first_row_needed(self, place: int) -> int:
        """The row before which a sequential reader at `place` needs none any more."""
        if self.plain:
            return place
        return Sequential(block_rows=self.rows_in_block, shard=Shard(*self.shard)).stretch(place).row

    def fields(self) -> dict[str, Any]:
        """As fields of a StreamActivations request; nothing where all is as ever."""
        if self.plain:
            return {}
        return {
            "order": f"READ_ORDER_{self.order.name}",
            "seed": self.seed,
            "epoch": self.epoch,
            "shard_index": self.shard[0],
            "shard_count": self.shard[1],
            "block_rows": self.block_rows,
        }


PLAIN = Reading()
