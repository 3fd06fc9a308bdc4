"""What a set takes on disk, and letting go of it."""

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
    """Removes sealed segments that end at or before `row`; returns the first row still kept. Safe to repeat."""
    manifest, kept = Manifest.load(folder), dropped_rows(folder)
    gone = index.records[index.n_before(kept) : index.n_before(row)]
    if not gone:
        return kept
    record_dropped(folder, gone[-1].end_row)
    for record in gone:
        for column in manifest.columns:
            segment_path(folder, column, record.segment).unlink(missing_ok=True)
    return gone[-1].end_row


def size_bytes(folder: Path) -> int:
    """Bytes of all files of a set, the open segment's reservation included."""
    return sum(sizes(folder))


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of a set's files that will stay as they are, and of the open segment's reservation."""
    kept = opened = 0
    # What goes while it is counted, a file or the whole set, counts no more.
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size = os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118 -- thousands of files
            except FileNotFoundError:
                continue
            kept, opened = (kept, opened + size) if name.endswith(OPEN_SUFFIX) else (kept + size, opened)
    return kept, opened


def delete_set(folder: Path) -> None:
    """Removes a set; its manifest goes first, so that a crash in between leaves no set that looks whole."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def throw_away(folder: Path, trash: Path) -> Path:
    """Takes a set out of the way in one step; returns where it lies until `shutil.rmtree`.

    It is whole in its place, or gone from there, also after a crash. Files that are mapped stay readable.
    """
    trash.mkdir(exist_ok=True)
    thrown = trash / f"{folder.name}.{uuid.uuid4().hex[:8]}"
    folder.rename(thrown)
    fsync_folder(folder.parent)
    return thrown
