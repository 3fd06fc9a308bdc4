"""Which columns the next pass over the corpus writes, and how far: a pure decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from activation_log.index import SegmentIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Write `columns` until `max_rows` rows exist in them; 0: to the end of the corpus."""

    columns: tuple[str, ...]
    max_rows: int


def next_pass(index: SegmentIndex, columns: Sequence[str], max_rows: int) -> Pass:
    """The columns with the fewest rows go on together, up to the next ones ahead of them.

    Segments that exist in other columns are filled to their end, also beyond `max_rows`: a segment has one row count.
    """
    rows = {name: index.n_rows([name]) for name in columns}
    least = min(rows.values())
    behind = tuple(name for name in columns if rows[name] == least)
    ahead = [n_rows for n_rows in rows.values() if n_rows > least]
    limits = [*([min(ahead)] if ahead else []), *([max_rows] if max_rows else [])]
    if not limits:
        return Pass(columns=behind, max_rows=0)
    known = index.find(min(limits) - 1)
    return Pass(columns=behind, max_rows=known.end_row if known else min(limits))
