"""What a node holds of a set, as its folder says: extractions of different columns and lengths share one set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_extractor.set_notes import SetNotes
from headrace_log import retention
from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

MAX_HOLDERS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOrders:
    """What the registry wants of a set. `pinned_until` is a Unix time; None: for ever."""

    pinned: bool = False
    pinned_until: float | None = None
    delete: bool = False

    def pinned_at(self, now: float) -> bool:
        """True while it must not be evicted, as far as was heard."""
        return self.pinned and (self.pinned_until is None or now < self.pinned_until)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSet:
    """One set on this node; `n_rows` counts the rows that all columns have, `size_bytes` what it takes on disk."""

    id: str
    model_id: str
    corpus_id: str
    columns: tuple[str, ...]
    retention: str
    path: str
    n_rows: int = 0
    size_bytes: int = 0
    complete: bool = False
    deleted: bool = False
    last_used: float = 0.0
    holders: tuple[str, ...] = ()

    @classmethod
    def gone(cls, set_id: str, folder: Path) -> HeldSet:
        """A set that is here no more."""
        return cls(id=set_id, model_id="", corpus_id="", columns=(), retention="RETAIN", path=str(folder), deleted=True)

    @classmethod
    def at(cls, folder: Path, *, set_id: str, n_rows: int = 0, holders: Sequence[str] = ()) -> HeldSet:
        """Reads the set in a folder. Raises the log's errors if it can't be read.

        `n_rows` are rows that all columns have although they are not sealed yet.
        """
        try:
            manifest = Manifest.load(folder)
        except FileNotFoundError:
            return cls.gone(set_id, folder)
        notes = SetNotes.load(folder)
        columns = tuple(column.name for column in manifest.columns)
        n_rows = max(n_rows, SegmentIndex.load(folder).n_rows(columns))
        return cls(
            id=manifest.set_id,
            model_id=notes.model_id,
            corpus_id=notes.corpus_id,
            columns=columns,
            retention=manifest.retention.upper(),
            path=str(folder),
            n_rows=n_rows,
            size_bytes=retention.size_bytes(folder),
            complete=manifest.complete and n_rows == manifest.total_rows,
            last_used=notes.last_used or time.time(),
            holders=tuple(holders)[:MAX_HOLDERS],
        )
