"""Turns on something that only one user at a time can have: first come, first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turns:
    """A queue of users. The user whose turn it is has position 0."""

    def __init__(self) -> None:
        self._queue: list[_User] = []

    @asynccontextmanager
    async def turn(self, on_position: Callable[[int], None]) -> AsyncIterator[None]:
        """Waits for a turn and keeps it for the block; calls `on_position` whenever the position in the queue changes.

        The wait has no deadline of its own: it ends when the turns before it have ended, or by cancelling.
        """
        user = _User(on_position)
        self._queue.append(user)
        self._tell_positions()
        try:
            await user.is_first.wait()
            yield
        finally:
            self._queue.remove(user)
            self._tell_positions()

    def _tell_positions(self) -> None:
        for position, user in enumerate(self._queue):
            if position == 0:
                user.is_first.set()
            elif position != user.position:
                user.position = position
                user.on_position(position)


class _User:
    def __init__(self, on_position: Callable[[int], None]) -> None:
        self.on_position = on_position
        self.is_first = asyncio.Event()
        self.position = 0
