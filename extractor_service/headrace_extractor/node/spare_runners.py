"""Runner processes started ahead: a load that takes one does not wait until torch and transformers are imported.

A spare holds no model and no GPU memory, and some 300 MB of main memory. It has no command under way but `prepare`, so
a load finds in it what it finds in a fresh process after its imports.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from headrace_chassis.errors import ServiceError
from headrace_extractor.node.ports import Runner, RunnerFactory
from headrace_extractor.node.runner_protocol import Prepare, Prepared

DEFAULT_SPARE_RUNNERS = 1
# Importing takes seconds, from a slow network disk a minute or two; longer is a hang.
_PREPARE_DEADLINE_S = 120.0
# The load that has taken a spare has the processors to itself for so long, then the next spare starts.
_PAUSE_S = 1.0
# A spare that dies again and again, for want of memory perhaps, is tried ever more rarely.
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Spare:
    """A process that waits for its first command; `taken` is done once it is handed out."""

    runner: Runner
    taken: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SpareRunners:
    """Implements RunnerFactory: hands out a process that was started ahead, or else starts one."""

    def __init__(
        self,
        start: RunnerFactory,
        *,
        environment: Mapping[str, str],
        n_spares: int = DEFAULT_SPARE_RUNNERS,
        pause_s: float = _PAUSE_S,
        first_retry_s: float = _FIRST_RETRY_S,
    ) -> None:
        self._start = start
        self._environment = environment
        self._n_spares = n_spares
        self._pause_s = pause_s
        self._first_retry_s = first_retry_s
        self._spares: deque[_Spare] = deque()

    async def __call__(self, *, environment: Mapping[str, str]) -> Runner:
        """Returns the oldest spare that answers, also one that still imports; starts a process where there is none."""
        while environment == self._environment and self._spares:
            spare = self._spares.popleft()
            spare.taken.set_result(None)
            answers = False
            try:
                with suppress(ServiceError, OSError):
                    await _prepare(spare.runner)  # At once if it was prepared; a dead process does not answer.
                    answers = True
            finally:
                if not answers:
                    await _end(spare.runner)
            if answers:
                return spare.runner
        return await self._start(environment=environment)

    async def run(self) -> None:
        """Keeps the spares until it is cancelled, then ends them."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._n_spares):
                group.create_task(self._keep_one(), name=f"spare-runner-{number}")

    async def _keep_one(self) -> None:
        retry_s = self._first_retry_s
        while True:
            if await self._offer_one():
                retry_s = self._first_retry_s
                await asyncio.sleep(self._pause_s)
            else:
                logger.warning("a spare runner ended before it was used; the next one starts in %.0f s", retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    async def _offer_one(self) -> bool:
        """Starts a spare and waits until it is handed out, then True, or has failed."""
        try:
            spare = _Spare(await self._start(environment=self._environment))
        except OSError as exc:
            logger.warning("a spare runner can't be started: %r", exc)
            return False
        self._spares.append(spare)
        ended = asyncio.create_task(spare.runner.wait())
        try:
            with suppress(ServiceError, OSError):
                await _prepare(spare.runner)
                await asyncio.wait((ended, spare.taken), return_when=asyncio.FIRST_COMPLETED)
            return spare.taken.done()
        finally:
            ended.cancel()
            if not spare.taken.done():
                self._spares.remove(spare)
                await _end(spare.runner)


async def _prepare(runner: Runner) -> None:
    """Has a runner import what a load needs; TimeoutError, RunnerLost, or the error that it answers with."""
    async with asyncio.timeout(_PREPARE_DEADLINE_S):
        async for _ in runner.run(Prepare(), ends=(Prepared,)):
            pass


async def _end(runner: Runner) -> None:
    try:
        await runner.kill()
    except TimeoutError:
        logger.error("a spare runner can't be ended; it keeps its memory while it lives")  # noqa: TRY400
