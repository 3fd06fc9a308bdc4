"""Waits for rows, divided between the extractor that computes them and the network that brings them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """For how long a reading thread has waited for messages: for the extractor, and for the network.

    The present wait, if there is one, began at `since`. It counts for the extractor if there were no rows (`no_rows`)
    when the server last spoke, up to 15 s ago. Replaced as a whole, so that other threads may read it at any time.
    """

    extractor_s: float = 0.0
    network_s: float = 0.0
    since: float | None = None
    no_rows: bool = False

    def by(self, now: float) -> tuple[float, float]:
        """Seconds for the extractor and for the network, the present wait included."""
        waited_s = 0.0 if self.since is None else now - self.since
        if self.no_rows:
            return self.extractor_s + waited_s, self.network_s
        return self.extractor_s, self.network_s + waited_s

    def over(self, now: float, *, no_rows: bool = False) -> Self:
        """Ends the present wait. With `no_rows`, the server's word now, all of it was for the extractor."""
        extractor_s, network_s = (replace(self, no_rows=True) if no_rows else self).by(now)
        return replace(self, extractor_s=extractor_s, network_s=network_s, since=None, no_rows=no_rows)

    def begun(self, now: float) -> Self:
        """Begins another wait."""
        return replace(self, since=now)


def shared_out(wait: float, extractor_s: float, network_s: float) -> tuple[float, float]:
    """Divides a consumer's wait in the proportion of the reading thread's: for the extractor, and for the network.

    `network_s` may be negative, where a wait turned out to be the extractor's.
    """
    network_s = max(0.0, network_s)
    both_s = extractor_s + network_s
    extractor = wait * extractor_s / both_s if both_s > 0 else 0.0
    return extractor, wait - extractor
