"""A pass on a runner, and the extractions that get rows of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import RunnerLost
from headrace_extractor.extractions.passes import Pass, Want
from headrace_extractor.extractions.values import Extraction
from headrace_extractor.meters import Transfer
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.runner_protocol import Message, Stop
from headrace_log.index import SegmentIndex


class Rider(Protocol):
    """An extraction, as the passes over its set see it."""

    value: Extraction
    stop: ServiceError | None

    @property
    def want(self) -> Want:
        """Rows and columns."""

    @property
    def grant_row(self) -> int | None:
        """The row its pass may write up to; None: no limit."""

    def on_waiting(self, event: Transfer | int) -> None:
        """The model loads, or so many are before it."""

    def on_begin(self) -> None:
        """A pass over its columns begins."""

    def on_committed(self, n_rows: int, n_non_finite: int) -> None:
        """Rows before `n_rows` are readable in all its columns."""

    def on_blocked(self) -> None:
        """The pass waits for a grant."""

    def on_lost(self) -> None:
        """What is not sealed is lost."""

    def on_found(self, n_rows: int) -> None:
        """Rows before `n_rows` are there without its doing, and more will come."""

    def on_all_rows(self, n_rows: int, n_non_finite: int) -> None:
        """Every row is there, and so many values that are NaN or infinite."""


class RunningPass:
    """A pass on a runner, and who gets rows of it."""

    def __init__(
        self, set_id: str, runner: Runner, planned: Pass, index: SegmentIndex, aboard: Sequence[Rider]
    ) -> None:
        self.runner = runner
        self.planned = planned
        self.aboard = list(aboard)
        self.first_row = self.n_rows = index.n_rows(planned.columns)
        self.n_non_finite = 0
        self.heard = False
        self.cut_short = False
        self._id = set_id
        self._index = index

    def rows_of(self, rider: Rider) -> int:
        """Rows that all columns of a rider have now."""
        return min(self._rows_beside(rider), self.n_rows)

    def in_it(self) -> list[Rider]:
        """Those aboard whose rows grow with this pass; the others' columns come later."""
        return [rider for rider in self.aboard if not rider.stop and self.covers(rider)]

    def covers(self, rider: Rider) -> bool:
        """True if the pass computes what the rider lacks now."""
        return self._rows_beside(rider) > self.first_row and not set(rider.want.columns).isdisjoint(
            self.planned.columns
        )

    def serves(self, riders: Sequence[Rider]) -> bool:
        """True if these want all the columns that are computed."""
        return set(self.planned.columns) <= {name for rider in riders for name in rider.want.columns}

    def has_all_of_any(self) -> bool:
        """True if somebody has the rows asked for already."""
        return any(0 < rider.want.max_rows <= self.rows_of(rider) for rider in self.aboard)

    def index_grew(self, folder: Path) -> bool:
        """True if a segment was sealed since the last look."""
        index = SegmentIndex.load(folder)
        grew = index.n_rows(self.planned.columns) > self._index.n_rows(self.planned.columns)
        self._index = index
        return grew

    async def end(self) -> None:
        """Has the runner seal what there is and finish."""
        self.cut_short = True
        await self.send(Stop(set_id=self._id))

    async def send(self, command: Message) -> None:
        """Steers the pass; a runner that is gone needs no steering."""
        with contextlib.suppress(RunnerLost):
            await self.runner.send(command)

    def _rows_beside(self, rider: Rider) -> int:
        """Rows of the rider's columns that this pass does not write; without such, more than there can be."""
        beside = [name for name in rider.want.columns if name not in self.planned.columns]
        return self._index.n_rows(beside) if beside else 1 << 62
