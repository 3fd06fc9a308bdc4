"""What a node notes beside a set's data: whose it is, when it was last used, whether it was pinned when last heard.

These files say nothing of the numbers; a set without them is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace_log import retention
from headrace_log.errors import DiskFull
from headrace_log.files import write_atomically
from headrace_log.holding import HOLD_NAME
from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

NOTES_NAME = "node.json"
LAST_USED_NAME = HOLD_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class SetNotes:
    """Notes of one set. Times are Unix times; `pinned_until` is None for a pin without end."""

    model_id: str = ""
    corpus_id: str = ""
    pinned: bool = False
    pinned_until: float | None = None
    last_used: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> SetNotes:
        """Reads them; without notes, a set was last used when its manifest was written."""
        known: dict[str, object] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            known = dict(json.loads((folder / NOTES_NAME).read_bytes()))
        return cls(**{**known, "last_used": _last_used(folder)})  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Writes all but the last use. On a full disk the old notes stay."""
        with contextlib.suppress(DiskFull, FileNotFoundError):
            fields = {name: value for name, value in asdict(self).items() if name != "last_used"}
            write_atomically(folder / NOTES_NAME, json.dumps(fields).encode() + b"\n")


def note_use(folder: Path, now: float | None = None) -> None:
    """Notes that the set is used now: the time of an empty file, which also a full disk can take."""
    path = folder / LAST_USED_NAME
    at = time.time() if now is None else now
    with contextlib.suppress(OSError):
        if folder.exists():
            path.touch()
            os.utime(path, (at, at))


def _last_used(folder: Path) -> float:
    for name in (LAST_USED_NAME, "manifest.json"):
        with contextlib.suppress(FileNotFoundError):
            return (folder / name).stat().st_mtime
    return 0.0


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
