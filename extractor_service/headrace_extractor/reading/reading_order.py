"""Reading orders: which row stands at each place of a reader's order, and how many places can be read already.

In the plain order, places are row numbers. Shards and shuffled orders count places of their own, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from headrace_extractor.errors import FieldInvalid
from headrace_extractor.extractions import window
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.extractions.values import ExtractionState
from headrace_log.order import DEFAULT_BLOCK_ROWS, Sequential, Shard, Shuffled, Stretch

MAX_SHARDS = 1 << 16
MAX_BLOCK_ROWS = 1 << 24
_ENDLESS = 1 << 62


class ReadOrder(StrEnum):
    """The order in which blocks are sent."""

    SEQUENTIAL = "sequential"
    SHUFFLED = "shuffled"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderRequest:
    """The order that a reader wants; checked when made."""

    order: ReadOrder = ReadOrder.SEQUENTIAL
    seed: int = 0
    epoch: int = 0
    shard_index: int = 0
    shard_count: int = 0
    block_rows: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.shard_count <= MAX_SHARDS:
            raise FieldInvalid(
                f"shard_count is {self.shard_count}; it must be from 0 to {MAX_SHARDS}.", field="shard_count"
            )
        if not 0 <= self.shard_index < max(self.shard_count, 1):
            raise FieldInvalid(
                f"shard_index is {self.shard_index}; it must be from 0 to shard_count - 1.", field="shard_index"
            )
        if not 0 <= self.block_rows <= MAX_BLOCK_ROWS:
            raise FieldInvalid(
                f"block_rows is {self.block_rows}; it must be from 0 ({DEFAULT_BLOCK_ROWS}) to {MAX_BLOCK_ROWS}.",
                field="block_rows",
            )
        if self.epoch < 0:
            raise FieldInvalid("epoch is negative; epochs are counted from 0.", field="epoch")

    @property
    def plain(self) -> bool:
        """True for one sequential shard: places are row numbers."""
        return self.order is ReadOrder.SEQUENTIAL and self.shard_count <= 1

    @property
    def shard(self) -> Shard:
        """The shard that is asked for."""
        return Shard(self.shard_index, max(self.shard_count, 1))


class Way(Protocol):
    """The way of a reader through an extraction: from places to rows."""

    block_rows: int  # 0: places are row numbers

    @property
    def n_there(self) -> int:
        """Places whose rows can be read now."""

    @property
    def end(self) -> int:
        """One past the last place that there will be; 0 while unknown."""

    def stretch(self, place: int) -> Stretch:
        """Consecutive rows from `place` on."""

    def first_row_needed(self, place: int) -> int:
        """The first row that a reader at `place` may still need."""


def way_of(job: ExtractionJob, request: OrderRequest) -> Way:
    """The way for a request. Raises FieldInvalid if a WINDOW set can't be read in that order."""
    if job.set.is_window:
        _check_window(job, request)
    if request.plain:
        return PlainWay(job)
    block_rows = request.block_rows or DEFAULT_BLOCK_ROWS
    if request.order is ReadOrder.SEQUENTIAL:
        return ShardWay(job, Sequential(block_rows=block_rows, shard=request.shard))
    return ShuffledWay(job, request, block_rows)


class PlainWay:
    """All rows, in their order."""

    block_rows = 0

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job

    @property
    def n_there(self) -> int:
        """Rows committed."""
        return self._job.value.n_rows

    @property
    def end(self) -> int:
        """One past the last row; 0 while unknown."""
        return self._job.end_row

    def stretch(self, place: int) -> Stretch:
        """All rows from `place` on."""
        return Stretch(place, _ENDLESS)

    def first_row_needed(self, place: int) -> int:
        """The next row."""
        return place


class ShardWay:
    """Every n-th block. A round, one block for each shard, can be read when all of its blocks are committed."""

    def __init__(self, job: ExtractionJob, order: Sequential) -> None:
        self._job = job
        self._order = order
        self.block_rows = order.block_rows

    @property
    def n_there(self) -> int:
        """Places in rounds that are committed."""
        return self._order.n_places(self._job.value.n_rows)

    @property
    def end(self) -> int:
        """Known once the extraction is done: `max_rows` may be more than the corpus has."""
        if self._job.value.state is not ExtractionState.DONE:
            return 0
        _check_not_empty(self.n_there, self._job.value.n_rows, self._order)
        return self.n_there

    def stretch(self, place: int) -> Stretch:
        """The rest of the block."""
        return self._order.stretch(place)

    def first_row_needed(self, place: int) -> int:
        """The next row of this shard; it needs no row of another shard."""
        return self._order.stretch(place).row


class ShuffledWay:
    """Blocks in permuted order, once the extraction has all its rows."""

    def __init__(self, job: ExtractionJob, request: OrderRequest, block_rows: int) -> None:
        self._job = job
        self._request = request
        self._order: Shuffled | None = None
        self.block_rows = block_rows

    @property
    def n_there(self) -> int:
        """All places once the extraction is done; before, none."""
        return self.end

    @property
    def end(self) -> int:
        """Known once the extraction is done."""
        if self._order is None:
            if self._job.value.state is not ExtractionState.DONE:
                return 0
            self._order = Shuffled(
                n_rows=self._job.value.n_rows,
                block_rows=self.block_rows,
                seed=self._request.seed,
                epoch=self._request.epoch,
                shard=self._request.shard,
            )
        _check_not_empty(self._order.n_places, self._order.n_rows, self._order)
        return self._order.n_places

    def stretch(self, place: int) -> Stretch:
        """The rest of the block."""
        assert self._order is not None, "a place was asked for before the extraction was done"
        return self._order.stretch(place)

    def first_row_needed(self, place: int) -> int:
        """Shown to people only: a set that is read in this order drops no row."""
        return place


def _check_not_empty(n_places: int, n_rows: int, order: Sequential | Shuffled) -> None:
    if not n_places:
        raise FieldInvalid(
            f"The extraction has {n_rows} rows, which make no block of {order.block_rows} for each of "
            f"{order.shard.count} shards; take smaller blocks or fewer shards.",
            field="block_rows",
        )


def _check_window(job: ExtractionJob, request: OrderRequest) -> None:
    if request.order is ReadOrder.SHUFFLED or request.epoch:
        field = "order" if request.order is ReadOrder.SHUFFLED else "epoch"
        raise FieldInvalid(
            f"Rows of a WINDOW set can be read once, in sequence, but {field} asks for more; extract with RETAIN to "
            "shuffle or to read several epochs.",
            field=field,
        )
    if request.plain:
        return
    manifest, window_bytes = job.set.manifest(), job.value.spec.retention.window_bytes
    round_rows = request.shard.count * (request.block_rows or DEFAULT_BLOCK_ROWS)
    # A segment may hold rows of this round and of the round before; it is dropped only when all its rows are released.
    if window.grant_row(manifest, window_bytes=window_bytes, first_kept_row=0) < round_rows + manifest.segment_rows:
        raise FieldInvalid(
            f"A window of {window_bytes} bytes can't hold a block for each of {request.shard.count} shards, "
            f"{round_rows} rows; take smaller blocks, or a larger window.",
            field="block_rows",
        )
