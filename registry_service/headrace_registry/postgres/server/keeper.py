"""Keeps the embedded Postgres alive for as long as the registry lives."""

from __future__ import annotations

import asyncio
import logging

from headrace_chassis.errors import StartError
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


class Keeper:
    """Restarts a postmaster that died. `look_now` makes it look at once."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._asked = asyncio.Event()

    def look_now(self) -> None:
        """A connection failed."""
        self._asked.set()

    async def run(self) -> None:
        """Runs until cancelled. A restart that fails is tried again."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            if await asyncio.to_thread(self._server.running):
                await asyncio.sleep(0.05)  # Connections may fail for other reasons; then this must not spin.
                continue
            log.warning("the embedded Postgres died; starting it again")
            try:
                await asyncio.to_thread(self._server.start)
            except StartError as exc:
                log.error("%s", exc)  # noqa: TRY400 - its message says it all.
                await asyncio.sleep(_LOOK_EVERY_S)
