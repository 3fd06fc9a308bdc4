"""Tells waiting calls of this process that something changed; the tables stay the truth.

A call in another replica sees the change by its own poll, at most `POLL_S` later.
"""

from __future__ import annotations

import asyncio

POLL_S = 1.0


class Wakeups:
    """One generation counter; `wait` returns when it moved on or after the poll interval."""

    def __init__(self) -> None:
        self._generation = 0
        self._moved = asyncio.Event()

    @property
    def generation(self) -> int:
        """Take it before reading the tables, give it to `wait` afterwards."""
        return self._generation

    def wake(self) -> None:
        """Lets everybody look again."""
        self._generation += 1
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait(self, seen: int, *, timeout_s: float = POLL_S) -> None:
        """Returns once something happened after `seen`, or after `timeout_s`."""
        if self._generation != seen or timeout_s <= 0:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError:
            return
