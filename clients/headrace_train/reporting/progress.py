"""Progress of a piece of work: totals, rates, and how often to show them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

_RATE_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Progress of one phase. `total` 0: unknown. `wait`: share of the last seconds spent waiting for rows."""

    phase: str
    done: int
    total: int
    rows_per_s: float = 0.0
    eta_s: float | None = None
    wait: float | None = None
    doing: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def percent(self) -> float | None:
        """0 to 100; None while the total is unknown."""
        return 100 * self.done / self.total if self.total else None


class Reporter(Protocol):
    """Shows progress and results. A context manager, since it may draw on the terminal meanwhile."""

    def note(self, text: str, **facts: Any) -> None:
        """Shows a line of text; `facts` are for machines."""

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Takes progress as often as the caller likes; shows some of it, and always the `last` tick of a phase."""

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Shows the results: `lines` to people, `facts` to machines."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class Meter:
    """Rates over the last seconds, from running totals of rows and of seconds waited."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int, float]] = deque([(clock(), 0, 0.0)])

    def tick(
        self, phase: str, done: int, total: int, *, wait_s: float | None = None, doing: str = "", **figures: float
    ) -> Tick:
        """Makes a tick from the totals so far."""
        now = self._clock()
        self._samples.append((now, done, wait_s or 0.0))
        while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_WINDOW_S:
            self._samples.popleft()
        then, done_then, wait_then = self._samples[0]
        span_s = max(now - then, 1e-9)
        rate = (done - done_then) / span_s
        return Tick(
            phase=phase,
            done=done,
            total=total,
            rows_per_s=rate,
            eta_s=max(0, total - done) / rate if total and rate > 0 else None,
            wait=None if wait_s is None else min(1.0, (wait_s - wait_then) / span_s),
            doing=doing,
            figures=figures,
        )


class Throttle:
    """Is due at most once in `every_s` seconds."""

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._next = 0.0

    def due(self) -> bool:
        """True if `every_s` seconds have passed since it was last due."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._every_s
        return True
