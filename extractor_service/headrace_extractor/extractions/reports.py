"""Tells the registry of the sets on this node, and hears what it wants of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from headrace_chassis.errors import ServiceError
from headrace_extractor.extractions.extractions import Extractions
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.sets.keeper import WINDOW_MARK
from headrace_extractor.sets.log_errors import log_errors_as_typed
from headrace_extractor.sets.notes import HeldSet
from headrace_extractor.sets.ports import SetRegistry

logger = logging.getLogger(__name__)


class SetReports:
    """Reports the set of an extraction as it is in its folder."""

    def __init__(self, extractions: Extractions, registry: SetRegistry, *, epoch: Callable[[], int]) -> None:
        self._extractions = extractions
        self._registry = registry
        self._epoch = epoch

    async def report(self, job: ExtractionJob) -> None:
        """Reports once; what goes wrong is left to the next report."""
        try:
            with log_errors_as_typed():
                held = await asyncio.to_thread(_held_set, job, self._extractions.holders(job.folder))
            if WINDOW_MARK in job.folder.name and (job.folder.parent / held.id / "manifest.json").exists():
                return  # A window beside the retained set of the same id, which is the one to be told of.
            order = await self._registry.report_set(self._epoch(), held)
            if not held.deleted:
                await self._extractions.keeper.heard(job.folder, order)
        except ServiceError as exc:
            logger.info("set %s could not be reported: %s", job.value.set_id, exc.message)
        except OSError:
            logger.exception("set %s could not be reported", job.value.set_id)


def _held_set(job: ExtractionJob, holders: Sequence[str]) -> HeldSet:
    """Rows that are not sealed yet count if the extraction has all columns of the set."""
    value = job.value
    held = HeldSet.at(job.folder, set_id=value.set_id, holders=holders)
    if value.state.ended or held.deleted or not set(held.columns) <= set(job.columns):
        return held
    return HeldSet.at(job.folder, set_id=value.set_id, n_rows=value.n_rows, holders=holders)
