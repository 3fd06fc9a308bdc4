"""Parity receipts: rows of a set compared with plain transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnParity:
    """Rows of one column compared with the rows that transformers computes for their document alone.

    `max_difference` is of single values. `max_relative_error` is the norm of a row's error by the norm of the row; it
    shows the loss of an 8-bit column.
    """

    name: str
    max_difference: float
    min_cosine: float
    max_relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReceipt:
    """At least `n_rows` rows, sampled while extracting, were compared in each of `columns`."""

    n_rows: int
    columns: tuple[ColumnParity, ...]

    @property
    def worst(self) -> ColumnParity:
        """The column with the largest relative error."""
        return max(self.columns, key=lambda column: column.max_relative_error)
