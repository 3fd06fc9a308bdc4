"""Facts about a set that say nothing of its numbers: model and corpus names, last use, pins, and the registry's wishes.

They lie in small files beside the set's data. A set without them is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from headrace_log.errors import DiskFull
from headrace_log.files import write_atomically
from headrace_log.holding import HOLD_NAME

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
        """Reads the notes; a set that was never used counts as last used when its manifest was written."""
        known: dict[str, object] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            names = {field.name for field in fields(cls)}
            known = {k: v for k, v in json.loads((folder / NOTES_NAME).read_bytes()).items() if k in names}
        last_used = 0.0
        for name in ("manifest.json", LAST_USED_NAME):
            with contextlib.suppress(FileNotFoundError):
                last_used = (folder / name).stat().st_mtime
        return cls(**{**known, "last_used": last_used})  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Writes everything but the last use. On a full disk the old notes stay."""
        with contextlib.suppress(DiskFull, FileNotFoundError):
            notes = {name: value for name, value in asdict(self).items() if name != "last_used"}
            write_atomically(folder / NOTES_NAME, json.dumps(notes).encode() + b"\n")


def note_use(folder: Path, now: float | None = None) -> None:
    """Notes that the set is used now. The note is the time of an empty file, which a full disk can take too."""
    path = folder / LAST_USED_NAME
    at = time.time() if now is None else now
    with contextlib.suppress(OSError):
        if folder.exists():
            path.touch()
            os.utime(path, (at, at))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOrders:
    """The registry's orders about a set. `pinned_until` is a Unix time; None: a pin without end."""

    pinned: bool = False
    pinned_until: float | None = None
    delete: bool = False

    def pinned_at(self, now: float) -> bool:
        """True while the set must not be evicted, as far as this node knows."""
        return self.pinned and (self.pinned_until is None or now < self.pinned_until)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSet:
    """A set on this node as the registry is told of it.

    `n_rows` counts the rows that all columns have; `size_bytes` are the bytes of all its files.
    """

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
    identity_json: str = ""

    @classmethod
    def gone(cls, set_id: str, folder: Path) -> HeldSet:
        """A set that this node does not have any more."""
        return cls(id=set_id, model_id="", corpus_id="", columns=(), retention="RETAIN", path=str(folder), deleted=True)
