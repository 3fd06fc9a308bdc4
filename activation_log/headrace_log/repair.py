"""Takes damaged segments out of a set, so that the next pass computes them again, bit for bit.

A damaged segment of one column leaves a hole: its record stays, with the row count and the resume point that the next
pass needs, but without the column's digest. Where the index itself is damaged, all segments from there on go.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path

from headrace_log.index import FILE_NAME as INDEX_NAME
from headrace_log.index import SegmentIndex, SegmentRecord
from headrace_log.layout import segment_path
from headrace_log.locks import WRITER_LOCK_NAME, FileLock
from headrace_log.manifest import Manifest
from headrace_log.segment_file import rows_on_file

# Beside its segment's place for people to look at, until the next writer of its column begins.
DAMAGED_SUFFIX = ".damaged"


def is_misrecorded(folder: Path, manifest: Manifest, record: SegmentRecord) -> bool:
    """True if the files of a segment agree on rows other than those on record: then the record is at fault."""
    columns = [column for column in manifest.columns if column.name in record.digests]
    found = {rows for column in columns if (rows := rows_on_file(segment_path(folder, column, record.segment), column))}
    return len(found) == 1 and found != {(record.first_row, record.n_rows)}


def set_aside(folder: Path, damaged: Collection[tuple[int, str]], *, n_segments: int | None = None) -> None:
    """Takes `damaged` segments, each a number and a column's name, off the index, and renames their files.

    With `n_segments` the index is cut to so many segments. An unreadable line of the index cuts it there in any case.
    Raises LockHeld while a writer writes the set, NoLocks and DiskFull.
    """
    with FileLock(folder / WRITER_LOCK_NAME):
        whole = SegmentIndex.load_readable(folder)
        index = (whole if n_segments is None else whole.cut(n_segments)).without(damaged)
        if len(index.records) < len(whole.records) or not whole.size_bytes:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(folder / INDEX_NAME, folder / f"{INDEX_NAME}{DAMAGED_SUFFIX}")
        index.save(folder)
        manifest = Manifest.load(folder)
        for segment, name in damaged:
            path = segment_path(folder, manifest.column(name), segment)
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_name(path.name + DAMAGED_SUFFIX))
