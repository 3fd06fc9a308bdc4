"""What a node notes beside a set's data: whose it is, when it was last used, whether it was pinned when last heard.

These files say nothing of the numbers; a set without them is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
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
