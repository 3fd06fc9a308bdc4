"""Loops that a server can't do without: an error that they did not expect is logged, and they go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

PAUSE_S = 1.0

logger = logging.getLogger(__name__)


async def going_on(
    loop: Callable[[], Awaitable[None]],
    *,
    name: str,
    pause_s: float = PAUSE_S,
    failed: Callable[[str], None] = lambda _name: None,
) -> None:
    """Runs a loop until it is cancelled, and again a moment after it has failed: no error in it ends the server.

    `failed` counts the failures.
    """
    while True:
        try:
            await loop()
        except Exception:
            logger.exception("%s failed and goes on in %.0f s", name, pause_s)
            failed(name)
        await asyncio.sleep(pause_s)
