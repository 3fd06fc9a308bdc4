"""`segments.jsonl`: the sealed segments, with digests and the point from which a writer goes on.

One line per sealing. A later line of the same segment adds columns to it. A last line without a newline is ignored: a
crash left it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_log.errors import SetCorrupt
from headrace_log.files import append_durably, write_atomically

FILE_NAME = "segments.jsonl"
DROPPED_NAME = "dropped.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """A sealed segment: rows `[first_row, end_row)`, SHA-256 of each column's data, and the resume point behind it.

    `non_finite` is the number of NaN or infinite values by column, only for columns that have any.
    """

    segment: int
    first_row: int
    n_rows: int
    digests: Mapping[str, str]
    resume: Mapping[str, Any]
    non_finite: Mapping[str, int] = field(default_factory=dict)

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.n_rows

    def to_line(self) -> bytes:
        """Returns the record as one line of `segments.jsonl`."""
        document = {
            "segment": self.segment,
            "first_row": self.first_row,
            "rows": self.n_rows,
            "sha256": dict(self.digests),
            "resume": dict(self.resume),
            **({"non_finite": dict(self.non_finite)} if self.non_finite else {}),
        }
        return json.dumps(document, separators=(",", ":")).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentIndex:
    """All sealed segments of a set, in order and without holes; `size_bytes` is how much of the file was read."""

    records: tuple[SegmentRecord, ...] = ()
    size_bytes: int = 0

    @classmethod
    def load(cls, folder: Path) -> SegmentIndex:
        """Reads the index; without a file it is empty."""
        return cls().refreshed(folder)

    def refreshed(self, folder: Path) -> SegmentIndex:
        """Returns the index with the segments recorded since, or itself if there are none. Reads only new lines."""
        try:
            with (folder / FILE_NAME).open("rb") as file:
                file.seek(self.size_bytes)
                content = file.read()
        except FileNotFoundError:
            return self
        new = content[: content.rfind(b"\n") + 1]
        if not new:
            return self
        records = list(self.records)
        for line in new[:-1].split(b"\n"):
            _merge(records, _parse(line, folder), folder)
        return SegmentIndex(records=tuple(records), size_bytes=self.size_bytes + len(new))

    def append(self, folder: Path, record: SegmentRecord) -> SegmentIndex:
        """Records a sealing on disk; returns the index with that record."""
        index = self.refreshed(folder)
        records, line = list(index.records), record.to_line()
        _merge(records, record, folder)
        path = folder / FILE_NAME
        if path.exists() and path.stat().st_size > index.size_bytes:
            with path.open("r+b") as file:  # A crash left part of a line behind the last newline.
                file.truncate(index.size_bytes)
        append_durably(path, line)
        return SegmentIndex(records=tuple(records), size_bytes=index.size_bytes + len(line))

    def n_rows(self, columns: Sequence[str], *, known_rows: int = 0) -> int:
        """Returns `sealed` of `columns`: rows sealed in every one of them. `known_rows` are not looked up again."""
        n_rows = known_rows
        for at in range(self.n_before(known_rows), len(self.records)):
            record = self.records[at]
            if any(name not in record.digests for name in columns):
                break
            n_rows = record.end_row
        return n_rows

    def n_before(self, row: int) -> int:
        """Returns how many segments end at or before `row`."""
        return bisect_right(self.records, row, key=lambda record: record.end_row)

    def n_non_finite(self, columns: Sequence[str], end_row: int) -> int:
        """Returns how many values of `columns` are NaN or infinite, in all segments that begin before `end_row`."""
        records = [record for record in self.records if record.first_row < end_row]
        return sum(record.non_finite.get(name, 0) for record in records for name in columns)

    def find(self, row: int) -> SegmentRecord | None:
        """Returns the sealed segment that holds `row`, or None."""
        at = bisect_right(self.records, row, key=lambda record: record.first_row) - 1
        return self.records[at] if at >= 0 and row < self.records[at].end_row else None


def dropped_rows(folder: Path) -> int:
    """Returns `first_kept`; 0 unless the set is a WINDOW set that has dropped rows."""
    try:
        return int(json.loads((folder / DROPPED_NAME).read_bytes())["first_row"])
    except FileNotFoundError:
        return 0


def record_dropped(folder: Path, first_row: int) -> None:
    """Moves `first_kept` to `first_row` on disk; the files are removed afterwards."""
    write_atomically(folder / DROPPED_NAME, json.dumps({"first_row": first_row}).encode() + b"\n")


def _parse(line: bytes, folder: Path) -> SegmentRecord:
    try:
        document = json.loads(line)
        return SegmentRecord(
            segment=document["segment"],
            first_row=document["first_row"],
            n_rows=document["rows"],
            digests=document["sha256"],
            resume=document["resume"],
            non_finite=document.get("non_finite", {}),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise SetCorrupt(f"{folder / FILE_NAME} has a line that is no record: {line[:80]!r}") from exc


def _merge(records: list[SegmentRecord], record: SegmentRecord, folder: Path) -> None:
    """Appends a record, or adds its columns to the record of the same segment. Raises SetCorrupt if it fits neither."""
    end_row = records[-1].end_row if records else 0
    if record.segment == len(records) and record.first_row == end_row and record.n_rows > 0:
        records.append(record)
        return
    known = records[record.segment] if record.segment < len(records) else None
    if known is None or (known.first_row, known.n_rows) != (record.first_row, record.n_rows):
        raise SetCorrupt(f"{folder / FILE_NAME}: segment {record.segment} does not fit behind row {end_row}")
    records[record.segment] = SegmentRecord(
        segment=known.segment,
        first_row=known.first_row,
        n_rows=known.n_rows,
        digests={**known.digests, **record.digests},
        resume=known.resume,
        non_finite={**known.non_finite, **record.non_finite},
    )
