"""Tells waiting calls that something changed; the tables stay the truth.

Calls of this process are woken at once, calls of other replicas by `postgres/server/listener.py`, which carries wakeups
both ways. Where that fails, a call sees the change by its own poll, at most `POLL_S` later.
"""

from __future__ import annotations

import asyncio

POLL_S = 1.0


class Wakeups:
    """A generation counter: `wait` returns once it has moved on, or after the poll interval."""

    def __init__(self, *, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._generation = 0
        self._moved = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def generation(self) -> int:
        """The current generation. Take it before reading the tables, and give it to `wait` afterwards."""
        return self._generation

    def wake(self) -> None:
        """Lets all waiting calls look again, here and in the other replicas. Call it after the commit."""
        self.heard()
        self._news.set()

    def heard(self) -> None:
        """Lets all waiting calls of this process look again: another replica changed something, or may have."""
        self._generation += 1
        self._moved.set()
        self._moved = asyncio.Event()

    async def news(self) -> None:
        """Returns once the other replicas have to be woken, and counts that as done."""
        await self._news.wait()
        self._news.clear()

    async def wait(self, seen: int, *, timeout_s: float | None = None) -> None:
        """Returns once the generation is not `seen` any more, or after `timeout_s`, by default the poll interval."""
        limit_s = self._poll_s if timeout_s is None else timeout_s
        if self._generation != seen or limit_s <= 0:
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._moved.wait()
        except TimeoutError:
            return
