"""Activation sets as nodes report them, and pins on them. The rows stay on the nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_owner, checked_text

RETENTIONS = ("RETAIN", "WINDOW")
_MAX_COLUMNS = 10_000
_MAX_HOLDERS = 20
_MAX_IDENTITY = 65_536  # A recipe takes some hundred characters, a device map in the load options the most.


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """One node's part of one set."""

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
    last_used_time: datetime | None = None
    holders: tuple[str, ...] = ()
    identity_json: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise FieldInvalid("set.id", "is empty")
        for field in ("id", "model_id", "corpus_id"):
            checked_text(getattr(self, field), field=f"set.{field}")
        checked_text(self.path, field="set.path", max_length=4096)
        checked_text(self.identity_json, field="set.identity_json", max_length=_MAX_IDENTITY)
        if self.n_rows < 0 or self.size_bytes < 0:
            raise FieldInvalid("set.n_rows", "counts must not be negative")
        if self.retention not in RETENTIONS:
            raise FieldInvalid("set.retention", f"{self.retention[:40]!r} must be one of {', '.join(RETENTIONS)}")
        if len(self.columns) > _MAX_COLUMNS:
            raise FieldInvalid("set.columns", f"more than {_MAX_COLUMNS}")
        if len(self.holders) > _MAX_HOLDERS:
            raise FieldInvalid("set.holders", f"more than {_MAX_HOLDERS}")
        for column in self.columns:
            checked_text(column, field="set.columns")
        for holder in self.holders:
            checked_text(holder, field="set.holders")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPin:
    """An owner's wish to keep a set; at most one for each set and owner. Without an `expire_time` it does not end."""

    set_id: str
    owner: str
    reason: str = ""
    expire_time: datetime | None = None

    def __post_init__(self) -> None:
        if not self.set_id:
            raise FieldInvalid("set_id", "is empty")
        checked_text(self.set_id, field="set_id")
        checked_owner(self.owner, field="owner")
        checked_text(self.reason, field="reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOrders:
    """Orders to a node about a set: keep it if pinned, at most until `pinned_until` (None: no end), or delete it."""

    pinned: bool = False
    pinned_until: datetime | None = None
    delete: bool = False

    @classmethod
    def of(cls, pins: Iterable[SetPin], *, delete: bool) -> SetOrders:
        """Returns the orders for a set with these living pins; a pinned set is never deleted."""
        ends = [pin.expire_time for pin in pins]
        known = [end for end in ends if end is not None]
        until = max(known) if known and len(known) == len(ends) else None
        return cls(pinned=bool(ends), pinned_until=until, delete=delete and not ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSet:
    """A node's report, with the times, living pins and deletion that the registry keeps beside it."""

    report: SetReport
    create_time: datetime
    update_time: datetime
    pins: tuple[SetPin, ...] = ()
    deleting: bool = False
