"""Carries wakeups between replicas over LISTEN and NOTIFY. A wakeup has no content: the changes are in the tables.

One connection does nothing but listen. When it is lost it is opened again, and since wakeups may have been missed, all
waiting calls look again. NOTIFY takes a lock that all committing notifiers share, so a replica sends at most one in
50 ms, outside of any transaction that did work.
"""

from __future__ import annotations

import asyncio
import logging
import uuid

import psycopg

from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.postgres.server.pool import Database
from headrace_registry.postgres.server.recipe import ConnectionRecipe
from headrace_registry.wakeups import Wakeups

log = logging.getLogger(__name__)

_CHANNEL = "headrace_registry"
_TELL_EVERY_S = 0.05
_RECONNECT_S = 0.5
_STATEMENT_TIMEOUT_S = 10.0
# A connection that was silent for this long is tried with a statement.
_SILENCE_S = 15.0
_NOTIFY = "SELECT pg_notify(%(channel)s, %(replica)s)"


class Listener:
    """Notifies the other replicas of this one's changes, and wakes this one's calls when another replica notifies."""

    def __init__(self, url: str, database: Database, wakeups: Wakeups) -> None:
        self._recipe = ConnectionRecipe.of(url)
        self._database = database
        self._wakeups = wakeups
        self._replica = uuid.uuid4().hex  # To leave out this replica's own notifications.
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._tell())

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except (psycopg.Error, OSError) as exc:
                log.info("listening again soon: %s", self._recipe.without_secrets(str(exc).strip()))
            finally:
                self.listening.clear()
            await asyncio.sleep(_RECONNECT_S)

    async def _listen_once(self) -> None:
        async with await self._recipe.connect(timeout_s=_STATEMENT_TIMEOUT_S) as conn:
            await conn.execute(f"LISTEN {_CHANNEL}")
            self.listening.set()
            self._wakeups.heard()
            while True:
                notices = [notice async for notice in conn.notifies(timeout=_SILENCE_S, stop_after=1)]
                if any(notice.payload != self._replica for notice in notices):
                    self._wakeups.heard()
                if not notices:
                    async with asyncio.timeout(_STATEMENT_TIMEOUT_S):
                        await conn.execute("SELECT 1")

    async def _tell(self) -> None:
        parameters = {"channel": _CHANNEL, "replica": self._replica}
        while True:
            await self._wakeups.news()
            try:
                await self._database.run(lambda conn: conn.execute(_NOTIFY, parameters))
            except (DatabaseUnavailable, psycopg.Error) as exc:
                log.info("the other replicas find out by themselves: %s", str(exc).strip())
            await asyncio.sleep(_TELL_EVERY_S)
