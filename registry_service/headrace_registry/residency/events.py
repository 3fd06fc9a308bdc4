"""Events of residencies, as watchers receive them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from headrace_registry.residency.residency import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyEvent:
    """A residency as it was after a change. In a snapshot `seq` is 0 in every event but the last."""

    seq: int
    time: datetime
    residency: Residency
    snapshot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBatch:
    """Consecutive events; the next ones have numbers larger than `seq`."""

    seq: int
    events: tuple[ResidencyEvent, ...]
