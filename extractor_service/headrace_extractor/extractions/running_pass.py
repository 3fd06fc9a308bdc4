"""A pass on a runner, and the extractions that get rows of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace_extractor.errors import RunnerLost
from headrace_extractor.extractions.passes import Pass
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.runner_protocol import Message, Stop
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_log.index import SegmentIndex

if TYPE_CHECKING:
    from headrace_extractor.extractions.job import ExtractionJob

# More rows than a set can have.
_NO_LIMIT = 1 << 62


class RunningPass:
    """A pass over the corpus that appends rows to some columns of a set, for the jobs that are aboard.

    A job is aboard if the pass was planned for it, or if it came later and lacks only rows that the pass computes.
    """

    def __init__(
        self, of: ActivationSet, runner: Runner, planned: Pass, index: SegmentIndex, aboard: Sequence[ExtractionJob]
    ) -> None:
        self.runner = runner
        self.planned = planned
        self.aboard = list(aboard)
        self.first_row = self.n_rows = index.n_rows(planned.columns)
        self.heard = False  # True once the runner has answered.
        self.cut_short = False
        self._set = of
        self._index = index

    def rows_of(self, job: ExtractionJob) -> int:
        """Rows that all columns of a job have now."""
        return min(self._rows_beside(job), self.n_rows)

    def growing(self) -> list[ExtractionJob]:
        """Jobs aboard whose rows grow with this pass; columns of the others are computed by a later pass."""
        return [job for job in self.aboard if not job.end_reason and self.covers(job)]

    def covers(self, job: ExtractionJob) -> bool:
        """True if the pass computes the columns in which the job lacks rows now."""
        return self._rows_beside(job) > self.first_row and not set(job.columns).isdisjoint(self.planned.columns)

    def serves(self, jobs: Sequence[ExtractionJob]) -> bool:
        """True if these jobs together want every column that is computed."""
        return set(self.planned.columns) <= {name for job in jobs for name in job.columns}

    def any_has_its_rows(self) -> bool:
        """True if a job aboard has as many rows as it asked for."""
        return any(0 < job.want.max_rows <= self.rows_of(job) for job in self.aboard)

    def sealed_more(self) -> bool:
        """True if a segment was sealed since the last call."""
        before, self._index = self._index, self._set.index()
        return self._index.n_rows(self.planned.columns) > before.n_rows(self.planned.columns)

    async def end(self) -> None:
        """Asks the runner to seal the rows it has and to finish."""
        self.cut_short = True
        await self.send(Stop(set_id=self._set.id))

    async def send(self, command: Message) -> None:
        """Sends a command that steers the pass; a lost runner needs none."""
        with contextlib.suppress(RunnerLost):
            await self.runner.send(command)

    def _rows_beside(self, job: ExtractionJob) -> int:
        """Rows of the job's columns that this pass does not write."""
        beside = [name for name in job.columns if name not in self.planned.columns]
        return self._index.n_rows(beside) if beside else _NO_LIMIT
