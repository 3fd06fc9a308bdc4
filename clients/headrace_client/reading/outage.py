"""How long a broken stream goes on trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace_client.errors import DeadlineExceeded, HeadraceError, StreamLost, TooManyStreams, Unavailable
from headrace_client.values import Backoff


@dataclass
class Outage:
    """Adds up the time without a live server since the last row, and paces the attempts to reconnect."""

    deadline_s: float
    backoff: Backoff
    clock: Callable[[], float] = time.monotonic
    lost_s: float = 0.0
    attempt: int = 0
    alive_at: float = 0.0
    reconnecting: bool = False

    def __post_init__(self) -> None:
        self.alive_at = self.clock()

    def row(self) -> None:
        """Notes that a row came: the outage is over."""
        self.lost_s, self.attempt = 0.0, 0
        self.alive()

    def alive(self) -> None:
        """Notes that the server spoke, or that the reader was busy: the time until now is no outage.

        Time lost before stays lost: the server still owes a row.
        """
        now = self.clock()
        if self.reconnecting:
            self.lost_s += now - self.alive_at
            self.reconnecting = False
        self.alive_at = now

    def pause_s(self, exc: HeadraceError, next_row: int) -> float:
        """The wait before the next attempt. Raises `exc` if no attempt can help, StreamLost after the deadline."""
        match exc:
            case StreamLost():
                may_pass = False
            case TooManyStreams():
                may_pass = self.attempt > 0  # The server may still count the connection that broke.
            case DeadlineExceeded():
                may_pass = exc.reason == DeadlineExceeded.REASON  # The call's own long life ended.
            case _:
                may_pass = isinstance(exc, Unavailable)
        if not may_pass:
            raise exc
        lost_s = self.lost_s + self.clock() - self.alive_at
        if lost_s > self.deadline_s:
            raise StreamLost(
                f"the stream broke and no row came for {lost_s:.0f} s; last: {exc}",
                metadata={"next_row": str(next_row), "last_reason": exc.reason},
            ) from exc
        pause = max(self.backoff.wait_s(self.attempt), min(exc.retry_after_s or 0.0, self.backoff.most_s))
        self.attempt += 1
        self.reconnecting = True
        # A little beyond the deadline, so that the last attempt finds it passed.
        return min(pause, max(self.deadline_s - lost_s, 0.0) + 0.01)
