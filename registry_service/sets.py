"""Activation sets as nodes report them; the data stay with the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from registry_service.errors import FieldInvalid
from registry_service.identifiers import checked_text

RETENTIONS = ("RETAIN", "WINDOW")
_MAX_COLUMNS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """What one node holds of one set."""

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

    def __post_init__(self) -> None:
        if not self.id:
            raise FieldInvalid("set.id", "is empty")
        for field in ("id", "model_id", "corpus_id"):
            checked_text(getattr(self, field), field=f"set.{field}")
        checked_text(self.path, field="set.path", max_length=4096)
        if self.n_rows < 0 or self.size_bytes < 0:
            raise FieldInvalid("set.n_rows", "counts must not be negative")
        if self.retention not in RETENTIONS:
            raise FieldInvalid("set.retention", f"{self.retention[:40]!r} must be one of {', '.join(RETENTIONS)}")
        if len(self.columns) > _MAX_COLUMNS:
            raise FieldInvalid("set.columns", f"more than {_MAX_COLUMNS}")
        for column in self.columns:
            checked_text(column, field="set.columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSet:
    """A report with the times the registry gave it."""

    report: SetReport
    create_time: datetime
    update_time: datetime
