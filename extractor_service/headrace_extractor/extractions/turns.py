"""Whose turn it is: first come, first served, and everyone knows the place in line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turns:
    """One at a time. The one whose turn it is has place 0."""

    def __init__(self) -> None:
        self._line: list[_Waiter] = []

    @asynccontextmanager
    async def turn(self, on_place: Callable[[int], None]) -> AsyncIterator[None]:
        """Waits for a turn and keeps it for the block; calls `on_place` with the place in line while it is not 0.

        The wait has no deadline of its own: it ends with the turns before it, or by cancelling.
        """
        waiter = _Waiter(on_place)
        self._line.append(waiter)
        self._tell()
        try:
            await waiter.first.wait()
            yield
        finally:
            self._line.remove(waiter)
            self._tell()

    def _tell(self) -> None:
        for place, waiter in enumerate(self._line):
            if place == 0:
                waiter.first.set()
            elif place != waiter.place:
                waiter.place = place
                waiter.on_place(place)


class _Waiter:
    def __init__(self, on_place: Callable[[int], None]) -> None:
        self.on_place = on_place
        self.first = asyncio.Event()
        self.place = 0
