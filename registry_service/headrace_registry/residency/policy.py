"""Every number by which residency is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Seconds and counts; 0 seconds means never or at once, as the comment of the field says."""

    # A model is not evicted for another one sooner: two models that do not fit together would take turns for ever.
    min_residency_s: float = 20.0
    # After this the first in a queue no longer waits for idle victims: models in use are drained for it.
    max_wait_s: float = 30.0
    # A model without lease, pin or waiter is unloaded after this; 0 for never.
    idle_timeout_s: float = 1800.0
    # Most residencies that wait for one device, and most calls that wait for any.
    max_queued: int = 64
    max_waiters: int = 512
    # After a failed load the model is not tried on that device for the first, doubled each time up to the second.
    backoff_s: float = 1.0
    max_backoff_s: float = 900.0
    # A runner that dies this soon after its last death or its last load counts as dying again.
    death_window_s: float = 60.0
    # A node that reports nothing about a load or an unload for this long is asked again.
    load_silence_s: float = 120.0
    unload_silence_s: float = 60.0
    # A load that takes longer has failed. Longer than the nodes' own limit: a node's error says more about the cause.
    load_deadline_s: float = 3700.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name} is {value}; it must not be negative")
        if self.max_queued < 1 or self.max_waiters < 1:
            raise ValueError("max_queued and max_waiters must be at least 1")

    def failure_backoff_s(self, n_failures: int) -> float:
        """Seconds not to try a device after `n_failures` failed loads in a row."""
        if n_failures < 1:
            return 0.0
        # 60 doublings pass any limit; without a bound the power overflows.
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(n_failures - 1, 60))


# One line on each number, for the command line's help.
POLICY_HELP = {
    "min_residency_s": "a loaded model is not evicted for another sooner",
    "max_wait_s": "after this, models in use are drained for the first in the queue",
    "idle_timeout_s": "unload what nobody used for so long; 0: never",
    "max_queued": "models that may wait for one device",
    "max_waiters": "calls that may wait for models",
    "backoff_s": "leave a place alone after a failed load; doubles",
    "max_backoff_s": "the longest of these",
    "death_window_s": "a model that dies twice within this is left alone as well",
    "load_silence_s": "ask a node again that says nothing of a load",
    "unload_silence_s": "ask a node again that says nothing of an unload",
    "load_deadline_s": "give a load up after this",
}
