"""Tells waiting calls that something changed; the tables stay the truth.

Calls of this process are woken at once, those of other replicas by `postgres/listener.py`, which carries the news both
ways. Where that fails, a call sees the change by its own poll, at most `POLL_S` later.
"""

from __future__ import annotations

import asyncio

POLL_S = 1.0


class Wakeups:
    """One generation counter; `wait` returns when it moved on or after the poll interval."""

    def __init__(self, *, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._generation = 0
        self._moved = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def generation(self) -> int:
        """Take it before reading the tables, give it to `wait` afterwards."""
        return self._generation

    def wake(self) -> None:
        """Lets everybody look again, here and in the other replicas: call it after the commit."""
        self.heard()
        self._news.set()

    def heard(self) -> None:
        """Lets everybody here look again: another replica changed something, or may have."""
        self._generation += 1
        self._moved.set()
        self._moved = asyncio.Event()

    async def news(self) -> None:
        """Returns once there is something to tell the other replicas, and takes it as told."""
        await self._news.wait()
        self._news.clear()

    async def wait(self, seen: int, *, timeout_s: float | None = None) -> None:
        """Returns once something happened after `seen`, or after the poll interval, or `timeout_s` if given."""
        limit_s = self._poll_s if timeout_s is None else timeout_s
        if self._generation != seen or limit_s <= 0:
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._moved.wait()
        except TimeoutError:
            return
