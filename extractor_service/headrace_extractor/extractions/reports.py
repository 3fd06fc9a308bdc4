"""Reports the sets of this node to the registry, and follows the orders that it answers with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from headrace_chassis.errors import ServiceError
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.sets.activation_sets import ActivationSets
from headrace_extractor.sets.keeper import SetKeeper
from headrace_extractor.sets.log_errors import log_errors_as_typed
from headrace_extractor.sets.notes import HeldSet
from headrace_extractor.sets.ports import SetRegistry

logger = logging.getLogger(__name__)


class SetReports:
    """Reports the set of an extraction as its files are."""

    def __init__(
        self, sets: ActivationSets, keeper: SetKeeper, registry: SetRegistry, *, epoch: Callable[[], int]
    ) -> None:
        self._sets = sets
        self._keeper = keeper
        self._registry = registry
        self._epoch = epoch

    async def report(self, job: ExtractionJob) -> None:
        """Reports once. A report that fails is logged only: the next one tells the same and more."""
        if job.set.is_window and self._sets.retained(job.set.id).exists:
            return  # The registry has one entry for each set id, and lists the rows that stay.
        try:
            with log_errors_as_typed():
                held = await asyncio.to_thread(_held_set, job, job.set.holders)
            order = await self._registry.report_set(self._epoch(), held)
            if not held.deleted:
                await self._keeper.follow_order(job.set, order)
        except ServiceError as exc:
            logger.info("set %s could not be reported: %s", job.set.id, exc.message)
        except OSError:
            logger.exception("set %s could not be reported", job.set.id)


def _held_set(job: ExtractionJob, holders: tuple[str, ...]) -> HeldSet:
    held = job.set.report(holders=holders)
    if job.value.state.ended or held.deleted or not set(held.columns) <= set(job.columns):
        return held
    # The extraction has all columns of the set, so its rows that are not sealed yet count too.
    return job.set.report(n_rows=job.value.n_rows, holders=holders)
