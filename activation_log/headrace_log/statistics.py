"""Statistics of hookpoint columns: of the values as stored; 8-bit values are multiplied by their scale first.

Beside the last sealed segment of a column lies `<segment>.statistics`, over all rows up to that segment's end: a
safetensors file with the float64 tensors `mean` and `m2`, and the other figures in its metadata. It is on disk before
the segment is recorded, and its predecessor is removed only afterwards: so the last recorded segment always has its
file, even after a crash.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace_log.checks import KEY, check, with_check
from headrace_log.files import write_atomically
from headrace_log.index import SegmentIndex
from headrace_log.layout import ColumnSpec, column_folder

SUFFIX = ".statistics"
# A writer that seals between two looks replaces the file; it can't do so five times in such a short time.
_LOOKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnStatistics:
    """Of `count` rows: mean and sum of squared deviations by element, means of the rows' norms and of their squares.

    A NaN or infinite value makes each figure that includes it NaN or infinite.
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    mean_norm: float
    mean_squared_norm: float

    def merged(self, other: ColumnStatistics) -> ColumnStatistics:
        """Returns the statistics of both groups of rows together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return ColumnStatistics(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * (self.count * share),
            mean_norm=self.mean_norm + (other.mean_norm - self.mean_norm) * share,
            mean_squared_norm=self.mean_squared_norm + (other.mean_squared_norm - self.mean_squared_norm) * share,
        )


class Summarize(Protocol):
    """Computes the statistics of rows in memory, in a thread of the writer's."""

    def __call__(self, column: ColumnSpec, rows: memoryview, scales: memoryview | None) -> ColumnStatistics:
        """`rows` are whole rows, at least one; `scales` has a float32 for each row of an 8-bit column."""


def statistics_path(folder: Path, column: ColumnSpec, segment: int) -> Path:
    """Returns the path of the statistics of all rows up to the end of a segment."""
    return column_folder(folder, column) / f"{segment:08d}{SUFFIX}"


def file_bytes(column: ColumnSpec) -> int:
    """Returns the largest size of a statistics file of this column: 1 KiB of header, and two float64 an element."""
    return 1024 + 16 * column.width


def save_statistics(path: Path, statistics: ColumnStatistics) -> None:
    """Writes a statistics file durably. Raises DiskFull."""
    n_bytes = statistics.mean.nbytes
    vectors = statistics.mean.astype("<f8").tobytes() + statistics.m2.astype("<f8").tobytes()
    figures = {
        "count": str(statistics.count),
        "mean_norm": repr(float(statistics.mean_norm)),
        "mean_squared_norm": repr(float(statistics.mean_squared_norm)),
        "vectors_crc32": str(zlib.crc32(vectors)),
    }
    header = json.dumps(
        {
            "__metadata__": {key: str(value) for key, value in with_check(figures).items()},
            "mean": {"dtype": "F64", "shape": list(statistics.mean.shape), "data_offsets": [0, n_bytes]},
            "m2": {"dtype": "F64", "shape": list(statistics.m2.shape), "data_offsets": [n_bytes, 2 * n_bytes]},
        },
        separators=(",", ":"),
    ).encode()
    header = header.ljust(-(-len(header) // 8) * 8)  # Aligned, as safetensors asks.
    write_atomically(path, len(header).to_bytes(8, "little") + header + vectors)


def read_statistics(path: Path, column: ColumnSpec) -> ColumnStatistics | None:
    """Reads a statistics file; None if it is absent or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        figures = json.loads(content[8:end])["__metadata__"]
        check({**figures, KEY: int(figures[KEY])} if KEY in figures else figures)
        if figures.get("vectors_crc32", vectors_crc32 := str(zlib.crc32(content[end:]))) != vectors_crc32:
            return None
        mean, m2 = np.frombuffer(content, "<f8", offset=end).reshape(2, column.width)
        return ColumnStatistics(
            count=int(figures["count"]),
            mean=mean,
            m2=m2,
            mean_norm=float(figures["mean_norm"]),
            mean_squared_norm=float(figures["mean_squared_norm"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def last_segment(index: SegmentIndex, column: ColumnSpec) -> int:
    """Returns the number of the last segment sealed in a column; -1 if there is none."""
    n_segments = 0
    for record in index.records:
        if column.name not in record.digests:
            break
        n_segments += 1
    return n_segments - 1


def load_statistics(folder: Path, column: ColumnSpec) -> ColumnStatistics | None:
    """Reads the statistics of all rows sealed in a column; None if there are no rows or no statistics."""
    for _ in range(_LOOKS):
        segment = last_segment(SegmentIndex.load(folder), column)
        if segment < 0:
            return None
        if found := read_statistics(statistics_path(folder, column, segment), column):
            return found
        if not any(column_folder(folder, column).glob(f"*{SUFFIX}")):
            return None
    return None


def summary_to_json(folder: Path, column: ColumnSpec, segment: int, statistics: ColumnStatistics) -> Mapping[str, Any]:
    """Returns the manifest entry: figures, and the file with the vectors. NaN and infinite figures are null."""
    figures = {"mean_norm": statistics.mean_norm, "mean_squared_norm": statistics.mean_squared_norm}
    return {
        "count": statistics.count,
        **{name: value if np.isfinite(value) else None for name, value in figures.items()},
        "file": str(statistics_path(folder, column, segment).relative_to(folder)),
    }
