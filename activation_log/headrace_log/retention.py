"""How many bytes a set takes on disk; dropping its rows, deleting it."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from headrace_log.files import fsync_folder
from headrace_log.index import SegmentIndex, dropped_rows, record_dropped
from headrace_log.layout import OPEN_SUFFIX, segment_path
from headrace_log.manifest import Manifest


def drop_before(folder: Path, row: int, index: SegmentIndex) -> int:
    """Drops sealed segments that end at or before `row`; returns the new `first_kept`. Safe to repeat."""
    manifest, kept = Manifest.load(folder), dropped_rows(folder)
    gone = index.records[index.n_before(kept) : index.n_before(row)]
    if not gone:
        return kept
    # On record before the files go: after a crash in between, a reader gets RowsExpired instead of a missing file.
    record_dropped(folder, gone[-1].end_row)
    for record in gone:
        for column in manifest.columns:
            segment_path(folder, column, record.segment).unlink(missing_ok=True)
    return gone[-1].end_row


def size_bytes(folder: Path) -> int:
    """Returns the bytes of all files of a set, with the full size of open segments."""
    return sum(sizes(folder))


def sizes(folder: Path) -> tuple[int, int]:
    """Returns the bytes of a set's finished files, and the full size of its open segments."""
    kept = opened = 0
    # A file, or the whole set, may be removed while it is counted; it then counts as nothing.
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size = os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118 -- thousands of files
            except FileNotFoundError:
                continue
            kept, opened = (kept, opened + size) if name.endswith(OPEN_SUFFIX) else (kept + size, opened)
    return kept, opened


def delete_set(folder: Path) -> None:
    """Removes a set, its manifest first: a crash in between leaves no set that looks whole."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def throw_away(folder: Path, trash: Path) -> Path:
    """Moves a set into `trash` in one step; returns its new folder, which the caller removes with `shutil.rmtree`.

    Even after a crash the set is either whole in its place or gone from there. Files that are mapped stay readable.
    """
    trash.mkdir(exist_ok=True)
    thrown = trash / f"{folder.name}.{uuid.uuid4().hex[:8]}"
    folder.rename(thrown)
    fsync_folder(folder.parent)
    return thrown
