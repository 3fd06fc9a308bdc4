"""What a set takes on disk, and letting go of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from activation_log.index import SegmentIndex, dropped_rows, record_dropped
from activation_log.layout import segment_path
from activation_log.manifest import Manifest


def drop_before(folder: Path, row: int) -> int:
    """Removes sealed segments that end at or before `row`; returns the first row still kept. Safe to repeat."""
    manifest, kept = Manifest.load(folder), dropped_rows(folder)
    gone = [r for r in SegmentIndex.load(folder).records if kept <= r.first_row and r.end_row <= row]
    if not gone:
        return kept
    record_dropped(folder, gone[-1].end_row)
    for record in gone:
        for column in manifest.columns:
            segment_path(folder, column, record.segment).unlink(missing_ok=True)
    return gone[-1].end_row


def size_bytes(folder: Path) -> int:
    """Bytes of all files of a set, the open segment's reservation included."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # Sealed or dropped while counting.
            continue
    return total


def delete_set(folder: Path) -> None:
    """Removes a set; its manifest goes first, so that a crash in between leaves no set that looks whole."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
