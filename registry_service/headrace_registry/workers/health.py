"""Tells health checks whether the database takes writes: without it the registry can do nothing for its callers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
# A restart of the embedded server is over sooner; load balancers need not hear of it.
_PATIENCE_S = 1.5


class Probe(Protocol):
    """The database, as far as its health goes."""

    async def answers(self, *, deadline_s: float) -> bool:
        """True if it takes writes now."""
        ...


class HealthWatch:
    """The loop that keeps the server's health; run it beside the server, which begins as serving."""

    def __init__(self, database: Probe, announce: Callable[[bool], Awaitable[None]]) -> None:
        self._database = database
        self._announce = announce
        self._serving = True

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            serving = await self._database.answers(deadline_s=_PATIENCE_S)
            if serving is not self._serving:
                level = logging.INFO if serving else logging.WARNING
                log.log(level, "the database %s", "is back" if serving else "is away; health says NOT_SERVING")
                await self._announce(serving)
                self._serving = serving
            await asyncio.sleep(_LOOK_EVERY_S)
