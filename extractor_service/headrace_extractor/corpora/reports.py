"""Tells the registry which corpora this node holds, so that one id names the same documents on all nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Protocol

from headrace_chassis.errors import ServiceError, ShuttingDown
from headrace_extractor.corpora.spec import Corpus
from headrace_extractor.errors import EpochStale, RegistryUnavailable

# Behind it, an ingest of hours is given up: its documents may not be kept without asking.
_CLAIM_DEADLINE_S = 60.0
_RETRY_S = 1.0
_LOOK_EVERY_S = 2.0

logger = logging.getLogger(__name__)


class CorpusRegistry(Protocol):
    """Corpora in the registry. Every method may raise RegistryUnavailable and EpochStale."""

    async def report_corpora(self, epoch: int, digests: Mapping[str, str], *, everything: bool) -> None:
        """Reports all corpora of this node, or asks for some; AlreadyExists if another node holds others."""


class CorpusReports:
    """Reports of one node. `claim` and `changed` are called from threads, `run` in the loop that made it."""

    def __init__(
        self, registry: CorpusRegistry, *, epoch: Callable[[], int], held: Callable[[], Mapping[str, str]]
    ) -> None:
        self._registry = registry
        self._epoch = epoch
        self._held = held
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def claim(self, corpus: Corpus) -> None:
        """Asks whether this node may keep the corpus. Raises AlreadyExists, RegistryUnavailable, ShuttingDown."""
        try:
            asyncio.run_coroutine_threadsafe(self._claim(corpus), self._loop).result()
        except (CancelledError, RuntimeError) as exc:  # The loop ends, or has ended.
            raise ShuttingDown from exc

    def changed(self) -> None:
        """Has all corpora reported soon, as after a deletion."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        """Reports after changes and in each new epoch of the node, until cancelled."""
        reported = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._changed.wait()
            epoch = self._epoch()
            if not epoch:
                await asyncio.sleep(_RETRY_S)  # A set event would not let other tasks run meanwhile.
                continue
            if epoch == reported and not self._changed.is_set():
                continue
            self._changed.clear()
            try:
                await self._registry.report_corpora(epoch, self._held(), everything=True)
                reported = epoch
            except ServiceError as exc:
                logger.info("the corpora are reported again soon: %s", exc.message)
                reported = 0
                await asyncio.sleep(_RETRY_S)

    async def _claim(self, corpus: Corpus) -> None:
        end = self._loop.time() + _CLAIM_DEADLINE_S
        while True:
            try:
                await self._registry.report_corpora(self._epoch(), {corpus.id: corpus.digest}, everything=False)
            except (RegistryUnavailable, EpochStale):
                if self._loop.time() >= end:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                return
