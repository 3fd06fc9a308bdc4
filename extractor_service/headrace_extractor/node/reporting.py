"""Telling the registry what happened here: tried a few times, then left to the next word that follows anyway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from headrace_extractor.errors import EpochStale, LeaseLost, RegistryUnavailable, StateConflict

RETRY_S = 1.0
# Progress is for people; a report is a transaction in the registry.
REPORT_INTERVAL_S = 0.5
REPORT_DEADLINE_S = 30.0

logger = logging.getLogger(__name__)


async def try_to_tell(tell: Callable[[], Awaitable[None]], attempts: int, what: str) -> bool:
    """Reports; gives up after `attempts`, or once the registry wants to hear no more of it: then returns False."""
    for attempt in range(attempts):
        try:
            async with asyncio.timeout(REPORT_DEADLINE_S):
                await tell()
        except (RegistryUnavailable, TimeoutError):
            if attempt + 1 < attempts:
                await asyncio.sleep(RETRY_S * (attempt + 1))
        except (LeaseLost, EpochStale, StateConflict) as exc:
            logger.info("report of %s refused: %s", what, exc.message)
            return False
        else:
            return True
    logger.warning("report of %s did not reach the registry", what)
    return True
