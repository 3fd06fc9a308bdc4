"""The deadline of the call that the current task works for."""

from __future__ import annotations

import time
from contextvars import ContextVar

# When the call that this server answers just now is over, by the loop's clock, which is time.monotonic().
current_deadline: ContextVar[float | None] = ContextVar("current_deadline", default=None)


def remaining_s() -> float | None:
    """Returns the seconds that the current call has left; None without a deadline, and behind it.

    Work may outlive the call that began it, such as giving back a lease: that call's deadline no longer holds for it.
    """
    ends_at = current_deadline.get()
    left_s = None if ends_at is None else ends_at - time.monotonic()
    return left_s if left_s is not None and left_s > 0 else None
