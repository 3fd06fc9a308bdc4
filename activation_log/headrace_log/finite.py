"""Counts the NaN and infinite values in a set's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace_log.index import SegmentIndex, SegmentRecord
from headrace_log.layout import ColumnSpec, Dtype, segment_path
from headrace_log.manifest import Manifest
from headrace_log.segment import DATA_OFFSET

# The bits of the exponent: in a value that is not finite, all of them are set.
_EXPONENT = {
    Dtype.FLOAT32: np.array(0x7F800000, "<u4"),
    Dtype.FLOAT16: np.array(0x7C00, "<u2"),
    Dtype.BFLOAT16: np.array(0x7F80, "<u2"),
}


def non_finite(folder: Path, index: SegmentIndex, columns: Sequence[str], end_row: int) -> Mapping[str, int]:
    """Counts the NaN and infinite values of `columns` in the rows before `end_row`; columns without any are left out.

    Whole segments have their count on record. A segment that `end_row` divides is read, unless its count is 0.
    """
    counts = dict.fromkeys(columns, 0)
    manifest = Manifest.load(folder)
    for record in index.records[: index.n_before(end_row) + 1]:
        for name in columns:
            if record.first_row < end_row and record.non_finite.get(name, 0):
                counts[name] += _of_segment(folder, manifest.column(name), record, end_row, manifest)
    return {name: count for name, count in counts.items() if count}


def _of_segment(folder: Path, column: ColumnSpec, record: SegmentRecord, end_row: int, manifest: Manifest) -> int:
    """Counts in one segment; not exact if the segment is divided and its file was dropped."""
    recorded = record.non_finite[column.name]
    if record.end_row <= end_row:
        return recorded
    # The values of an 8-bit row are finite exactly if its scale is.
    stored = manifest.column(column.scale_column) if column.scale_column else column
    exponent = _EXPONENT[stored.dtype]
    n_values = (end_row - record.first_row) * stored.width
    try:
        bits = np.fromfile(
            segment_path(folder, stored, record.segment), exponent.dtype, count=n_values, offset=DATA_OFFSET
        )
    except FileNotFoundError:  # Dropped meanwhile: only the recorded count is known.
        return recorded
    return int(np.count_nonzero((bits & exponent) == exponent)) * (column.width // stored.width)
