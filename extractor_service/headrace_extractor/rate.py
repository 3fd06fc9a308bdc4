"""A rate over the last few seconds."""

from __future__ import annotations

from collections import deque

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
