"""The parity receipt of a set: its rows against what transformers computes by itself, sampled while extracting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_log.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnParity:
    """How one column compares; errors of rows are relative to their length."""

    name: str
    max_difference: float
    min_cosine: float
    max_relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReceipt:
    """`n_rows` rows at least were compared in each of `columns`."""

    n_rows: int
    columns: tuple[ColumnParity, ...]


def receipt_of(manifest: Manifest, columns: Sequence[str]) -> ParityReceipt | None:
    """The receipt of these columns, without the columns that have none; None if no column has one."""
    entries = {name: manifest.receipt[name] for name in columns if name in manifest.receipt}
    if not entries:
        return None
    return ParityReceipt(
        n_rows=min(int(entry["rows"]) for entry in entries.values()),
        columns=tuple(
            ColumnParity(
                name=name,
                max_difference=entry["max_difference"],
                min_cosine=entry["min_cosine"],
                max_relative_error=entry["max_relative_error"],
            )
            for name, entry in entries.items()
        ),
    )
