"""Keeps events rare."""

from __future__ import annotations

import time
from collections.abc import Callable


class Throttle:
    """Lets through at most `per_second` events a second."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = 1 / per_second
        self._clock = clock
        self._next = clock()

    def ready(self) -> bool:
        """Returns True, and counts the event, if the last one is long enough ago."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True
