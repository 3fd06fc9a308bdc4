"""The loop that all Watch RPCs share: events, heartbeats, the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from headrace_chassis.shutdown import Shutdown

T = TypeVar("T")

# The contract promises this interval; it is well under the idle limit of the usual proxies (60 s).
HEARTBEAT_INTERVAL_S = 15.0


async def watch(
    events: AsyncIterator[T],
    *,
    heartbeat: Callable[[], T],
    shutdown: Shutdown,
    interval_s: float = HEARTBEAT_INTERVAL_S,
) -> AsyncGenerator[T, None]:
    """Yields `events` and, after every `interval_s` of silence, a `heartbeat()`.

    Ends when `events` ends, and closes it. Raises the errors of `events`, and ShuttingDown when the server goes away.
    """
    async with aclosing(shutdown.watching(events, idle_s=interval_s, on_idle=heartbeat)) as items:
        async for item in items:
            yield item
