"""Activation sets, as nodes hold them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPin:
    """An owner's wish that a set is kept, until `expire_time` or for ever."""

    owner: str
    reason: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSet:
    """One node's copy of a set; `holders` read or extend it now."""

    id: str
    node_id: str
    model_id: str
    corpus_id: str
    columns: tuple[str, ...]
    n_rows: int
    size_bytes: int
    complete: bool
    retention: str
    path: str
    create_time: datetime | None = None
    update_time: datetime | None = None
    last_used_time: datetime | None = None
    pins: tuple[SetPin, ...] = ()
    holders: tuple[str, ...] = ()
    deleting: bool = False
