"""One event that tells every long task of a server to come to an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from headrace_chassis.errors import ShuttingDown

T = TypeVar("T")

# A source that ignores its cancellation for longer than this is abandoned; the process is about to end.
_CLOSE_TIMEOUT_S = 5.0


class Shutdown:
    """Begins once and never ends. Belongs to one event loop; `begin` is called there."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def begun(self) -> bool:
        """True from the first `begin` on."""
        return self._event.is_set()

    def begin(self) -> None:
        """Starts the shutdown; a second call is no error."""
        self._event.set()

    async def wait(self) -> None:
        """Returns once the shutdown has begun."""
        await self._event.wait()

    def check(self) -> None:
        """Raises ShuttingDown once the shutdown has begun; cheap enough for a loop's body."""
        if self.begun:
            raise ShuttingDown

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what `work` returns; cancels it and raises ShuttingDown as soon as the shutdown begins."""
        stop, pending = asyncio.create_task(self.wait()), asyncio.create_task(work)
        try:
            await asyncio.wait({pending, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                raise ShuttingDown
            return pending.result()
        finally:
            stop.cancel()
            if not pending.done():
                await _cancel(pending)

    async def watching(
        self, items: AsyncIterator[T], *, idle_s: float | None = None, on_idle: Callable[[], T] | None = None
    ) -> AsyncGenerator[T, None]:
        """Yields `items`, and `on_idle()` after every `idle_s` without an item; raises ShuttingDown once it begins.

        Owns `items`: however the loop ends, a wait for the next item is cancelled and `items` is closed.
        """
        stop = asyncio.create_task(self.wait())
        pending: asyncio.Task[T] | None = None
        try:
            while True:
                self.check()
                # Not create_task: the next item of an async generator is an awaitable, but no coroutine.
                pending = pending or asyncio.ensure_future(anext(items))
                await asyncio.wait({pending, stop}, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
                if pending.done():
                    finished, pending = pending, None
                    try:
                        item = finished.result()
                    except StopAsyncIteration:
                        return
                    yield item
                elif on_idle is not None and not stop.done():
                    yield on_idle()
        finally:
            stop.cancel()
            if pending is not None:
                await _cancel(pending)
            if isinstance(items, AsyncGenerator) and (pending is None or pending.done()):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await items.aclose()


async def _cancel(pending: asyncio.Task[T]) -> None:
    # A look at the exception keeps asyncio from reporting it as never retrieved.
    pending.add_done_callback(lambda task: task.cancelled() or task.exception())
    pending.cancel()
    await asyncio.wait({pending}, timeout=_CLOSE_TIMEOUT_S)
