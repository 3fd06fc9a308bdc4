"""The rate of a count that grows, such as bytes loaded or rows written."""

from __future__ import annotations

from collections import deque

# Long enough to smooth over single slow reads, short enough for an ETA that follows the present speed.
SPAN_S = 5.0
# Readings in between replace each other, so that a meter holds at most about a hundred of them.
_APART_S = SPAN_S / 100


class Meter:
    """Counts per second, the mean of the last `SPAN_S` seconds.

    While the meter is younger, and where readings are further apart, the mean is over the time since the first reading
    kept, or since the one before.
    """

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque()

    def at(self, count: int, now: float) -> float:
        """Takes a reading at `now` (seconds of any steady clock); returns the rate, 0 until a second reading."""
        if len(self._readings) > 1 and now - self._readings[-2][0] < _APART_S:
            self._readings.pop()
        self._readings.append((now, count))
        while len(self._readings) > 2 and now - self._readings[0][0] > SPAN_S:
            self._readings.popleft()
        since, start = self._readings[0]
        # A count falls where bytes are thrown away and fetched again.
        return max(0.0, (count - start) / (now - since)) if now > since else 0.0

    def clear(self) -> None:
        """Forgets all readings: after a pause the rate starts anew."""
        self._readings.clear()
