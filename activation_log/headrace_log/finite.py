"""How many values of a set's rows are NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace_log.index import SegmentIndex, SegmentRecord
from headrace_log.layout import ColumnSpec, Dtype, segment_path
from headrace_log.manifest import Manifest
from headrace_log.segment import DATA_OFFSET

# The bits of the exponent, all of them set in what is not finite.
_EXPONENT = {
    Dtype.FLOAT32: np.array(0x7F800000, "<u4"),
    Dtype.FLOAT16: np.array(0x7C00, "<u2"),
    Dtype.BFLOAT16: np.array(0x7F80, "<u2"),
}


def non_finite(folder: Path, index: SegmentIndex, columns: Sequence[str], end_row: int) -> Mapping[str, int]:
    """Values of `columns` that are NaN or infinite in the rows before `end_row`; columns without one are left out.

    A whole segment has its count on record; one of which only some rows are meant is read, if there is any in it.
    """
    counts = dict.fromkeys(columns, 0)
    manifest = Manifest.load(folder)
    for record in index.records[: index.n_before(end_row) + 1]:
        for name in columns:
            if record.first_row < end_row and record.non_finite.get(name, 0):
                counts[name] += _of_segment(folder, manifest.column(name), record, end_row, manifest)
    return {name: count for name, count in counts.items() if count}


def _of_segment(folder: Path, column: ColumnSpec, record: SegmentRecord, end_row: int, manifest: Manifest) -> int:
    recorded = record.non_finite[column.name]
    if record.end_row <= end_row:
        return recorded
    # The values of an 8-bit row are as finite as its scale.
    stored = manifest.column(column.scale_column) if column.scale_column else column
    exponent = _EXPONENT[stored.dtype]
    n_values = (end_row - record.first_row) * stored.width
    try:
        bits = np.fromfile(
            segment_path(folder, stored, record.segment), exponent.dtype, count=n_values, offset=DATA_OFFSET
        )
    except FileNotFoundError:  # Let go since: what is on record is all that is known.
        return recorded
    return int(np.count_nonzero((bits & exponent) == exponent)) * (column.width // stored.width)
