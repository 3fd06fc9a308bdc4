"""The changes that time brings: leases run out, nodes fall silent, old rows go.

Every replica runs these loops; each step is idempotent SQL by the database's clock. The detection of silent nodes has a
loop of its own: neither a slow nor a failing step of another loop holds it up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from headrace_registry.postgres.models.validations import ValidationStore
from headrace_registry.postgres.purge import Purge
from headrace_registry.postgres.residency.leases import LeaseStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.pins import PinStore
from headrace_registry.postgres.residency.upkeep import ResidencyUpkeep
from headrace_registry.residency.nodes import MISSED_HEARTBEATS
from headrace_registry.workers.rounds import FailureCount, attempt, uncounted

log = logging.getLogger(__name__)

_TICK_S = 1.0
# Old rows are deleted after a day or more: a few minutes more do not matter.
_PURGE_EVERY_S = 600.0


class Listening:
    """Measures for how long this replica could hear nodes without a break.

    While the registry or its database was away no heartbeat could arrive: silence in that time tells nothing.
    """

    def __init__(self, *, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._since: float | None = None
        self._last = 0.0

    def tick(self, now: float) -> float:
        """Notes that the database answered at `now`; returns the seconds listened."""
        if self._since is None or now - self._last > self._longest_gap_s:
            self._since = now
        self._last = now
        return now - self._since


class Upkeep:
    """The loops of upkeep, run beside the server."""

    def __init__(
        self,
        *,
        leases: LeaseStore,
        nodes: NodeStore,
        residencies: ResidencyUpkeep,
        pins: PinStore,
        validations: ValidationStore,
        purge: Purge,
        heartbeat_interval_s: float,
        failed: FailureCount = uncounted,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._nodes = nodes
        self._residencies = residencies
        self._pins = pins
        self._validations = validations
        self._purge = purge
        self._failed = failed
        self._silent_s = heartbeat_interval_s * MISSED_HEARTBEATS
        self._tick_s = min(_TICK_S, heartbeat_interval_s / 2)
        self._listening = Listening(longest_gap_s=self._tick_s + heartbeat_interval_s)
        self._clock = clock

    async def run(self) -> None:
        """Runs until cancelled."""
        loops: tuple[tuple[float, Sequence[Callable[[], Awaitable[object]]]], ...] = (
            (self._tick_s, (self._leases.expire, self.lose_silent)),
            (self._tick_s, (self._pins.purge, self._validations.tidy, self._residencies.tidy)),
            (_PURGE_EVERY_S, (self._purge.run,)),
        )
        async with asyncio.TaskGroup() as group:
            for every_s, steps in loops:
                group.create_task(self._rounds(every_s, steps))

    async def lose_silent(self) -> None:
        """Marks silent nodes LOST, each in a transaction of its own: one that fails holds no other up."""
        silent = await self._nodes.silent(self._silent_s)
        if self._listening.tick(self._clock()) <= self._silent_s:
            return
        for node_id in silent:

            async def lose(node_id: str = node_id) -> None:
                if await self._nodes.lose(node_id, self._silent_s):
                    log.warning("node %s is silent", node_id)

            await attempt("lose_silent", lose, self._failed)
            # A thousand nodes may fall silent at once, and take longer than the longest gap.
            self._listening.tick(self._clock())

    async def _rounds(self, every_s: float, steps: Sequence[Callable[[], Awaitable[object]]]) -> None:
        while True:
            for step in steps:
                await attempt(getattr(step, "__qualname__", "upkeep"), step, self._failed)
            await asyncio.sleep(every_s)
