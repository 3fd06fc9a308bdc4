"""The way of one reader through an extraction: which rows stand at its places, and how many of them are there yet.

For a plain reader places are row numbers. Shards and shuffled readers have places of their own, counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from headrace_extractor.errors import FieldInvalid
from headrace_extractor.extractions import window
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.extractions.values import ExtractionState
from headrace_log.manifest import Manifest
from headrace_log.order import DEFAULT_BLOCK_ROWS, Sequential, Shard, Shuffled, Stretch

MAX_SHARDS = 1 << 16
MAX_BLOCK_ROWS = 1 << 24
_ENDLESS = 1 << 62


class ReadOrder(StrEnum):
    """In which order blocks are sent."""

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
        """True for one sequential shard: places are rows."""
        return self.order is ReadOrder.SEQUENTIAL and self.shard_count <= 1

    @property
    def shard(self) -> Shard:
        """Which of how many."""
        return Shard(self.shard_index, max(self.shard_count, 1))


class Way(Protocol):
    """From places to rows."""

    block_rows: int  # 0: places are rows

    @property
    def n_there(self) -> int:
        """Places whose rows can be read now."""

    @property
    def end(self) -> int:
        """One past the last place there will be; 0 while unknown."""

    def stretch(self, place: int) -> Stretch:
        """Rows from `place` on that stand together."""

    def first_row_needed(self, place: int) -> int:
        """The row before which a reader at `place` needs none any more."""


def way_of(job: ExtractionJob, request: OrderRequest) -> Way:
    """The way that fits a request. Raises FieldInvalid for one that a WINDOW set can't go."""
    if job.value.spec.retention.is_window:
        _check_window(job, request)
    if request.plain:
        return PlainWay(job)
    block_rows = request.block_rows or DEFAULT_BLOCK_ROWS
    if request.order is ReadOrder.SEQUENTIAL:
        return ShardWay(job, Sequential(block_rows=block_rows, shard=request.shard))
    return ShuffledWay(job, request, block_rows)


class PlainWay:
    """Row after row."""

    block_rows = 0

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job

    @property
    def n_there(self) -> int:
        """Rows committed."""
        return self._job.value.n_rows

    @property
    def end(self) -> int:
        """Rows there will be."""
        return self._job.end_row

    def stretch(self, place: int) -> Stretch:
        """No limit but the end."""
        return Stretch(place, _ENDLESS)

    def first_row_needed(self, place: int) -> int:
        """The next one."""
        return place


class ShardWay:
    """Every n-th block as it is committed; a round of blocks begins when all of them are there, one for each shard."""

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
        return _not_none(self.n_there, self._job.value.n_rows, self._order)

    def stretch(self, place: int) -> Stretch:
        """The rest of the block."""
        return self._order.stretch(place)

    def first_row_needed(self, place: int) -> int:
        """The next row of this shard; those before it are of no use to it."""
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
        """All places, or none."""
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
        return _not_none(self._order.n_places, self._order.n_rows, self._order)

    def stretch(self, place: int) -> Stretch:
        """The rest of the block."""
        assert self._order is not None, "a place was asked for before any was there"
        return self._order.stretch(place)

    def first_row_needed(self, place: int) -> int:
        """For people only: a set that is read in this order keeps its rows."""
        return place


def _not_none(n_places: int, n_rows: int, order: Sequential | Shuffled) -> int:
    if not n_places:
        raise FieldInvalid(
            f"The extraction has {n_rows} rows, which make no block of {order.block_rows} for each of "
            f"{order.shard.count} shards; take smaller blocks or fewer shards.",
            field="block_rows",
        )
    return n_places


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
    manifest, window_bytes = Manifest.load(job.folder), job.value.spec.retention.window_bytes
    round_rows = request.shard.count * (request.block_rows or DEFAULT_BLOCK_ROWS)
    # A segment may hold rows of this round and of the one before; it goes when all of it was released.
    if window.grant_row(manifest, window_bytes=window_bytes, first_kept_row=0) < round_rows + manifest.segment_rows:
        raise FieldInvalid(
            f"A window of {window_bytes} bytes can't hold a block for each of {request.shard.count} shards, "
            f"{round_rows} rows; take smaller blocks, or a larger window.",
            field="block_rows",
        )
