"""What happened to residencies, as watchers are told."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from headrace_registry.residency.residency import Residency


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyEvent:
    """A residency as it was after something happened to it. `seq` is 0 in a snapshot, but for its last event."""

    seq: int
    time: datetime
    residency: Residency
    snapshot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBatch:
    """Events in order; what comes next has a `seq` larger than `seq`."""

    seq: int
    events: tuple[ResidencyEvent, ...]
