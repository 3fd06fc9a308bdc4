"""A rate over the last few seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SPAN_S = 5.0


class RateMeter:
    """Rows per second over the last `SPAN_S` seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=256)

    def at(self, n_rows: int, now: float) -> float:
        """Notes a row count; returns the rate, 0 while there is but one."""
        self._seen.append((now, n_rows))
        while len(self._seen) > 2 and now - self._seen[0][0] > SPAN_S:
            self._seen.popleft()
        then, rows_then = self._seen[0]
        return (n_rows - rows_then) / (now - then) if now > then else 0.0

    def clear(self) -> None:
        """Forgets everything: after a pause the rate starts anew."""
        self._seen.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far a piece of work that moves bytes has come."""

    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0

    @property
    def percent(self) -> float:
        """0 to 100; 0 while the total is unknown."""
        return 100.0 * self.done_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds left at the present rate; negative while unknown."""
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_per_s if self.rate_bytes_per_s else -1.0


class TransferMeter:
    """Makes `Transfer` values with a rate over the time since it was made."""

    def __init__(self, now: float) -> None:
        self._start = now

    def at(self, done_bytes: int, total_bytes: int, now: float) -> Transfer:
        """The transfer as of `now`."""
        elapsed = now - self._start
        rate = done_bytes / elapsed if elapsed > 0 else 0.0
        return Transfer(done_bytes=done_bytes, total_bytes=total_bytes, rate_bytes_per_s=rate)
