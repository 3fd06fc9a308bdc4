"""`manifest.json`: identity, columns and extent of a set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace_log.checks import check, with_check
from headrace_log.errors import SetCorrupt
from headrace_log.files import UNREADABLE, write_atomically
from headrace_log.layout import PROVENANCE, ColumnSpec
from headrace_log.locks import FileLock

FORMAT = 1
FILE_NAME = "manifest.json"
LOCK_NAME = "manifest.lock"
# Held for one small read and one small write, which a busy disk may keep waiting for seconds.
_LOCK_WAIT_S = 10.0

# Large enough that sealing (a digest, an fsync and a rename per column) is rare; small enough that a crash, which costs
# the open segment, is cheap, and that a WINDOW set holds several.
SEGMENT_BYTES = 64 * 1024 * 1024
MAX_SEGMENT_ROWS = 1 << 20


def set_id_of(identity: Mapping[str, Any]) -> str:
    """Returns the digest of everything that determines a set's numbers: 32 hex digits of SHA-256, canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def segment_rows_for(columns: Sequence[ColumnSpec], segment_bytes: int = SEGMENT_BYTES) -> int:
    """Returns the rows of a full segment, so that its columns together take about `segment_bytes`."""
    row_bytes = sum(column.row_bytes for column in columns)
    return min(max(segment_bytes // row_bytes, 1), MAX_SEGMENT_ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Identity, columns and extent of a set. `total_rows` is known once the corpus is exhausted.

    `statistics` and `receipt` are by column; `docs/format.md` has the fields of their entries.
    """

    set_id: str
    identity: Mapping[str, Any]
    columns: tuple[ColumnSpec, ...]
    segment_rows: int
    retention: str = "retain"
    total_rows: int | None = None
    statistics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    receipt: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.segment_rows < 1:
            raise ValueError("segment_rows must be at least 1")
        if self.retention not in ("retain", "window"):
            raise ValueError(f"retention {self.retention!r} is neither retain nor window")
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError(f"duplicate columns in {names}")
        if tuple(self.columns[:3]) != PROVENANCE:
            raise ValueError("the first columns of a set are token_id, document and position")

    @property
    def complete(self) -> bool:
        """True when the set's extent is known."""
        return self.total_rows is not None

    @property
    def hookpoints(self) -> tuple[ColumnSpec, ...]:
        """Columns of hookpoints: all but the three of provenance and the columns of scales."""
        scales = {column.scale_column for column in self.columns}
        return tuple(column for column in self.columns if not column.is_provenance and column.name not in scales)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all columns."""
        return sum(column.row_bytes for column in self.columns)

    def column(self, name: str) -> ColumnSpec:
        """Returns the column with this name; raises KeyError if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    def with_columns(self, extra: Sequence[ColumnSpec]) -> Manifest:
        """Returns the manifest with the columns of `extra` added that it does not have yet."""
        names = {column.name for column in self.columns}
        return replace(self, columns=(*self.columns, *(column for column in extra if column.name not in names)))

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` atomically; creates the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "format": FORMAT,
            "set_id": self.set_id,
            "identity": dict(self.identity),
            "columns": [column.to_json() for column in self.columns],
            "segment_rows": self.segment_rows,
            "retention": self.retention,
            "total_rows": self.total_rows,
            "statistics": dict(self.statistics),
            "receipt": dict(self.receipt),
        }
        write_atomically(folder / FILE_NAME, json.dumps(with_check(document), indent=2).encode() + b"\n")

    @classmethod
    def update(cls, folder: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Replaces the manifest by `change(manifest)`, under a lock between processes; returns the new manifest.

        Raises LockHeld, NoLocks, SetCorrupt and DiskFull.
        """
        with FileLock(folder / LOCK_NAME, wait_s=_LOCK_WAIT_S):
            manifest = change(cls.load(folder))
            manifest.save(folder)
            return manifest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads `manifest.json`. Raises FileNotFoundError if there is no set, SetCorrupt if the file is no manifest."""
        path = folder / FILE_NAME
        try:
            document = json.loads(path.read_bytes())
            if document["format"] != FORMAT:
                raise SetCorrupt(f"{folder} has format {document['format']}, this version reads {FORMAT}")
            check(document)
            return cls(
                set_id=document["set_id"],
                identity=document["identity"],
                columns=tuple(ColumnSpec.from_json(entry) for entry in document["columns"]),
                segment_rows=document["segment_rows"],
                retention=document["retention"],
                total_rows=document["total_rows"],
                statistics=document.get("statistics", {}),  # Sets of older versions lack both.
                receipt=document.get("receipt", {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
            raise SetCorrupt(f"{path} is not a manifest ({exc}); delete the set to recompute it") from exc
        except OSError as exc:
            if exc.errno not in UNREADABLE:
                raise
            raise SetCorrupt(f"{path} can't be read: {exc.strerror}") from exc
