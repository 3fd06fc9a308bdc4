"""What an extraction would cost."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_extractor.corpora.counting import RowCount


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Rows, bytes and seconds before any work; negative: not known."""

    n_rows: int
    n_tokens: int
    n_rows_cached: int
    size_bytes: int
    seconds: float
    new_bytes: int = -1
    available_bytes: int = -1


def estimate(count: RowCount, *, max_rows: int, n_rows_cached: int, row_bytes: int, rows_per_s: float) -> Estimate:
    """Combines a count of rows with what is known of set and node."""
    n_rows = min(count.n_rows, max_rows) if max_rows else count.n_rows
    to_compute = max(n_rows - n_rows_cached, 0)
    return Estimate(
        n_rows=n_rows,
        n_tokens=count.n_tokens,
        n_rows_cached=n_rows_cached,
        size_bytes=n_rows * row_bytes,
        seconds=to_compute / rows_per_s if rows_per_s else (-1.0 if to_compute else 0.0),
    )
