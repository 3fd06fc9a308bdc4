"""Keeps loops going: an error that nothing foresaw is logged and counted, and the next round comes as usual."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from headrace_registry.errors import DatabaseUnavailable

log = logging.getLogger(__name__)


class FailureCount(Protocol):
    """Counts the failed rounds of a loop, such as a metric does."""

    def __call__(self, loop: str) -> None:
        """Adds one for the loop of that name."""
        ...


class Worker(Protocol):
    """A loop beside the server."""

    async def run(self) -> None:
        """Runs until cancelled."""
        ...


def uncounted(loop: str) -> None:
    """Counts nothing."""


async def attempt(name: str, step: Callable[[], Awaitable[object]], failed: FailureCount) -> bool:
    """Runs one step. Returns False if it failed; a database that is away is no failure to count."""
    try:
        await step()
    except DatabaseUnavailable as exc:
        log.warning("%s waits: %s", name, exc.message)
    except Exception:
        log.exception("%s failed", name)
        failed(name)
    else:
        return True
    return False
