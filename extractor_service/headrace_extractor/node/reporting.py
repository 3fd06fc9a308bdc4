"""Reports to the registry. A report is tried a few times, then given up: a later one follows in any case."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from headrace_extractor.errors import EpochStale, LeaseLost, RegistryUnavailable, StateConflict

RETRY_S = 1.0
# Progress is read by people, so twice a second is enough; each report is a transaction in the registry.
REPORT_INTERVAL_S = 0.5
REPORT_DEADLINE_S = 30.0

logger = logging.getLogger(__name__)


async def try_to_tell(tell: Callable[[], Awaitable[None]], attempts: int, what: str) -> None:
    """Calls `tell`, up to `attempts` times, until the registry takes or refuses the report; `what` is for the log."""
    for attempt in range(attempts):
        try:
            async with asyncio.timeout(REPORT_DEADLINE_S):
                await tell()
        except (RegistryUnavailable, TimeoutError):
            if attempt + 1 < attempts:
                await asyncio.sleep(RETRY_S * (attempt + 1))
        except (LeaseLost, EpochStale, StateConflict) as exc:  # Repeating a report out of date would not help.
            logger.info("report of %s refused: %s", what, exc.message)
            return
        else:
            return
    logger.warning("report of %s did not reach the registry", what)
