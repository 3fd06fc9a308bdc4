"""`segments.jsonl`: the sealed segments, with digests and the point from which a writer goes on.

One line per sealing. A later line of the same segment adds columns to it. A last line without a newline is ignored: a
crash left it. Lines are only ever added, but for repairs (`repair.py`), which replace the whole file.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace_log.checks import check, check_line, checked_line, with_check
from headrace_log.errors import SetCorrupt
from headrace_log.files import append_durably, unreadable_as_typed, write_atomically

FILE_NAME = "segments.jsonl"
DROPPED_NAME = "dropped.json"
_REMEDY = "start the extraction again, which computes the rows from there on anew"


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
        return checked_line(document)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentIndex:
    """All sealed segments of a set, in order and without gaps between their rows.

    A column may lack a segment that other columns have, also in its middle: a hole, which the next pass fills.
    `size_bytes` is how much of the file was read. `inode` and `last_line` tell when a repair has replaced the file,
    which may get the inode of an earlier one; `n_replaced` is how often that was so.
    """

    records: tuple[SegmentRecord, ...] = ()
    size_bytes: int = 0
    inode: int = field(default=0, compare=False)
    last_line: bytes = field(default=b"", compare=False, repr=False)
    n_replaced: int = field(default=0, compare=False)

    @classmethod
    def load(cls, folder: Path) -> SegmentIndex:
        """Reads the index; without a file it is empty."""
        return cls().refreshed(folder)

    def refreshed(self, folder: Path) -> SegmentIndex:
        """Returns the index with the segments recorded since, or itself if there are none. Reads only new lines.

        Reads a file that a repair has replaced from its start. Raises SetCorrupt.
        """
        try:
            with unreadable_as_typed(folder / FILE_NAME), (folder / FILE_NAME).open("rb") as file:
                stat = os.fstat(file.fileno())
                file.seek(self.size_bytes - len(self.last_line))
                last_line, content = file.read(len(self.last_line)), file.read()
                if self.size_bytes and (stat.st_ino != self.inode or last_line != self.last_line):
                    return SegmentIndex(n_replaced=self.n_replaced + 1).refreshed(folder)
        except FileNotFoundError:
            return self
        new = content[: content.rfind(b"\n") + 1]
        if not new:
            return self
        records = list(self.records)
        lines = new[:-1].split(b"\n")
        for line in lines:
            _merge(records, _parse(line, folder), folder)
        return SegmentIndex(
            records=tuple(records),
            size_bytes=self.size_bytes + len(new),
            inode=stat.st_ino,
            last_line=lines[-1] + b"\n",
            n_replaced=self.n_replaced,
        )

    @classmethod
    def load_readable(cls, folder: Path) -> SegmentIndex:
        """Reads the index up to the first line that is no record or does not fit behind the lines before it.

        Its `size_bytes` is 0 if there is such a line. Raises SetCorrupt if the file as a whole can't be read.
        """
        try:
            with unreadable_as_typed(folder / FILE_NAME):
                content = (folder / FILE_NAME).read_bytes()
        except FileNotFoundError:
            return cls()
        records: list[SegmentRecord] = []
        try:
            for line in content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]:
                _merge(records, _parse(line, folder), folder)
        except SetCorrupt:
            return cls(records=tuple(records))
        return cls(records=tuple(records), size_bytes=len(content))

    def without(self, damaged: Collection[tuple[int, str]]) -> SegmentIndex:
        """Returns the index without these segments of columns, each given by its number and the column's name."""
        if not damaged:
            return self
        records = list(self.records)
        for number in {segment for segment, _ in damaged if segment < len(records)}:
            record = records[number]
            gone = {name for segment, name in damaged if segment == number}
            records[number] = replace(
                record,
                digests={name: digest for name, digest in record.digests.items() if name not in gone},
                non_finite={name: count for name, count in record.non_finite.items() if name not in gone},
            )
        return replace(self, records=tuple(records))

    def cut(self, n_segments: int) -> SegmentIndex:
        """Returns the index with its first `n_segments` segments only."""
        return replace(self, records=self.records[:n_segments])

    def save(self, folder: Path) -> None:
        """Replaces the file; only the set's writer may. Raises DiskFull."""
        write_atomically(folder / FILE_NAME, b"".join(record.to_line() for record in self.records))

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
        return SegmentIndex(
            records=tuple(records),
            size_bytes=index.size_bytes + len(line),
            inode=path.stat().st_ino,
            last_line=line,
            n_replaced=index.n_replaced,
        )

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

    def hole_end(self, column: str, row: int) -> int | None:
        """Returns the first row from `row` on in a segment that is sealed in `column`; None if there is none."""
        for record in self.records[self.n_before(row) :]:
            if column in record.digests:
                return record.first_row
        return None

    def n_non_finite(self, columns: Sequence[str], end_row: int) -> int:
        """Returns how many values of `columns` are NaN or infinite, in all segments that begin before `end_row`."""
        records = [record for record in self.records if record.first_row < end_row]
        return sum(record.non_finite.get(name, 0) for record in records for name in columns)

    def find(self, row: int) -> SegmentRecord | None:
        """Returns the sealed segment that holds `row`, or None."""
        at = bisect_right(self.records, row, key=lambda record: record.first_row) - 1
        return self.records[at] if at >= 0 and row < self.records[at].end_row else None


def dropped_rows(folder: Path) -> int:
    """Returns `first_kept`; 0 unless the set is a WINDOW set that has dropped rows. Raises SetCorrupt."""
    try:
        with unreadable_as_typed(folder / DROPPED_NAME):
            document = json.loads((folder / DROPPED_NAME).read_bytes())
        first_row = document["first_row"]
        check(document)
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise SetCorrupt(f"{folder / DROPPED_NAME} names no row; delete the set to recompute it") from exc
    if type(first_row) is not int or first_row < 0:
        raise SetCorrupt(f"{folder / DROPPED_NAME} names no row; delete the set to recompute it")
    return first_row


def record_dropped(folder: Path, first_row: int) -> None:
    """Moves `first_kept` to `first_row` on disk; the files are removed afterwards."""
    write_atomically(folder / DROPPED_NAME, json.dumps(with_check({"first_row": first_row})).encode() + b"\n")


def _parse(line: bytes, folder: Path) -> SegmentRecord:
    try:
        check_line(line)
        document = json.loads(line)
        record = SegmentRecord(
            segment=document["segment"],
            first_row=document["first_row"],
            n_rows=document["rows"],
            digests=document["sha256"],
            resume=document["resume"],
            non_finite=document.get("non_finite", {}),
        )
        numbers = (record.segment, record.first_row, record.n_rows, *record.non_finite.values())
        is_record = (
            all(type(number) is int and number >= 0 for number in numbers)
            and all(isinstance(digest, str) for digest in record.digests.values())
            and isinstance(record.resume, dict)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise _no_record(line, folder) from exc
    if not is_record:
        raise _no_record(line, folder)
    return record


def _no_record(line: bytes, folder: Path) -> SetCorrupt:
    return SetCorrupt(f"{folder / FILE_NAME} has a line that is no record: {line[:80]!r}; {_REMEDY}")


def _merge(records: list[SegmentRecord], record: SegmentRecord, folder: Path) -> None:
    """Appends a record, or adds its columns to the record of the same segment. Raises SetCorrupt if it fits neither."""
    end_row = records[-1].end_row if records else 0
    if record.segment == len(records) and record.first_row == end_row and record.n_rows > 0:
        records.append(record)
        return
    known = records[record.segment] if record.segment < len(records) else None
    if known is None or (known.first_row, known.n_rows) != (record.first_row, record.n_rows):
        raise SetCorrupt(f"{folder / FILE_NAME}: segment {record.segment} does not fit behind row {end_row}; {_REMEDY}")
    records[record.segment] = SegmentRecord(
        segment=known.segment,
        first_row=known.first_row,
        n_rows=known.n_rows,
        digests={**known.digests, **record.digests},
        resume=known.resume,
        non_finite={**known.non_finite, **record.non_finite},
    )
