"""The changes that time brings: leases run out, nodes fall silent, old rows go.

Every replica runs this loop; each step is idempotent SQL by the database's clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.postgres.models.sets import SetStore
from headrace_registry.postgres.models.validations import ValidationStore
from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.postgres.residency.leases import LeaseStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.pins import PinStore
from headrace_registry.postgres.residency.upkeep import ResidencyUpkeep
from headrace_registry.residency.nodes import MISSED_HEARTBEATS

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
    """The loop of upkeep, run beside the server."""

    def __init__(
        self,
        *,
        leases: LeaseStore,
        nodes: NodeStore,
        residencies: ResidencyUpkeep,
        pins: PinStore,
        events: EventStore,
        validations: ValidationStore,
        sets: SetStore,
        heartbeat_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._nodes = nodes
        self._residencies = residencies
        self._pins = pins
        self._events = events
        self._validations = validations
        self._sets = sets
        self._silent_s = heartbeat_interval_s * MISSED_HEARTBEATS
        self._tick_s = min(_TICK_S, heartbeat_interval_s / 2)
        self._listening = Listening(longest_gap_s=self._tick_s + heartbeat_interval_s)
        self._clock = clock
        self._purged = clock()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self.tick()
            except DatabaseUnavailable as exc:
                log.warning("upkeep pauses: %s", exc.message)
            except Exception:
                log.exception("a round of upkeep failed")
            await asyncio.sleep(self._tick_s)

    async def tick(self) -> None:
        """Does one round."""
        n_expired = await self._leases.expire()
        if n_expired:
            log.info("%d leases expired", n_expired)
        if self._listening.tick(self._clock()) > self._silent_s:
            for node_id in await self._nodes.lose_silent(self._silent_s):
                log.warning("node %s is silent", node_id)
        await self._pins.purge()
        await self._validations.tidy()
        await self._residencies.tidy()
        if self._clock() - self._purged > _PURGE_EVERY_S:
            await self._residencies.purge()
            await self._sets.purge_pins()
            await self._events.trim()
            self._purged = self._clock()
