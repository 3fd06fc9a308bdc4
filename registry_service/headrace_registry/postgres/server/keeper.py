"""Restarts the embedded Postgres when it dies, as long as the registry runs."""

from __future__ import annotations

import asyncio
import logging

from headrace_chassis.errors import StartError
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


class Keeper:
    """Looks twice a second whether the postmaster lives, and starts it again if not."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._asked = asyncio.Event()

    def look_now(self) -> None:
        """Looks at once: call it when a connection failed."""
        self._asked.set()

    async def run(self) -> None:
        """Runs until cancelled. A restart that failed is tried again."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            if await asyncio.to_thread(self._server.running):
                await asyncio.sleep(0.05)  # Connections may fail for other reasons: the loop must not spin then.
                continue
            log.warning("the embedded Postgres died; starting it again")
            try:
                await asyncio.to_thread(self._server.start)
            except StartError as exc:
                log.error("%s", exc)  # noqa: TRY400 - its message says it all.
                await asyncio.sleep(_LOOK_EVERY_S)
