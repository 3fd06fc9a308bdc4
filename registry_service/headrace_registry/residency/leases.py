"""Leases: a reader's right that a residency stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from headrace_registry.errors import FieldInvalid

DEFAULT_TTL_S = 60.0
# Loading a large model from a cold disk takes minutes.
DEFAULT_WAIT_S = 600.0
# Longest time to live and longest wait.
MAX_S = 3600.0
# Leases are renewed at a third of their life: a shorter one would need a call in less than two seconds.
MIN_TTL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One granted lease. It ends at `expire_time`, by the database's clock, unless it is renewed."""

    id: str
    residency_id: str
    model_id: str
    holder: str
    fence: int
    ttl_s: float
    expire_time: datetime
    node_id: str
    node_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """The lease to grant once the model is resident."""

    holder: str
    ttl_s: float
    request_id: str = ""


def checked_ttl_s(ttl_s: float) -> float:
    """Checks a time to live: 5 to 3600 seconds, 0 for 60."""
    if ttl_s == 0:
        return DEFAULT_TTL_S
    if not math.isfinite(ttl_s) or not MIN_TTL_S <= ttl_s <= MAX_S:
        raise FieldInvalid("ttl_s", f"{ttl_s} must be between {MIN_TTL_S:g} and {MAX_S:g} seconds")
    return ttl_s


def checked_wait_s(wait_s: float) -> float:
    """Checks how long a call may wait: up to 3600 seconds, 0 for 600."""
    if wait_s == 0:
        return DEFAULT_WAIT_S
    if not math.isfinite(wait_s) or not 0 < wait_s <= MAX_S:
        raise FieldInvalid("wait_s", f"{wait_s} must be positive and at most {MAX_S:g} seconds")
    return wait_s
