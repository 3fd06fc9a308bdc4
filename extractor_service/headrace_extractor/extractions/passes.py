"""Which columns the next pass over the corpus writes, and how far: a pure decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_log.index import SegmentIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """The rows that one extraction wants of a set: `max_rows` rows of `columns`; 0: as many as the corpus gives."""

    columns: tuple[str, ...]
    max_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Write `columns` until `max_rows` rows exist in them; 0: to the end of the corpus."""

    columns: tuple[str, ...]
    max_rows: int


def next_pass(index: SegmentIndex, wants: Sequence[Want], total_rows: int | None = None) -> Pass | None:
    """The next pass, for the columns with the fewest rows, up to the row where the next column begins to lack rows too.

    Where a repair has left a hole in a column, the pass ends with that hole. A segment that exists in other columns is
    filled to its end, even beyond the rows wanted: a segment has one row count. `total_rows` is the set's extent if
    that is known. None when no row is missing.
    """
    targets: dict[str, int] = {}  # Rows wanted of each column; 0: all.
    for want in wants:
        for name in want.columns:
            all_rows = want.max_rows == 0 or targets.get(name) == 0
            targets[name] = 0 if all_rows else max(want.max_rows, targets.get(name, 0))
    rows = {name: index.n_rows([name]) for name in targets}
    lacking = [name for name in targets if not _has_all(rows[name], targets[name], total_rows)]
    if not lacking:
        return None
    least = min(rows[name] for name in lacking)
    behind = tuple(name for name in lacking if rows[name] == least)
    ahead = [rows[name] for name in lacking if rows[name] > least]
    holes = [end for name in behind if (end := index.hole_end(name, least)) is not None]
    limits = [*([min(ahead)] if ahead else []), *holes, *(targets[name] for name in behind if targets[name])]
    if not limits:
        return Pass(columns=behind, max_rows=0)
    limit = min(limits)
    known = index.find(limit - 1)
    return Pass(columns=behind, max_rows=known.end_row if known else limit)


def has_all(index: SegmentIndex, want: Want, total_rows: int | None) -> bool:
    """True when every wanted row is sealed."""
    return _has_all(index.n_rows(want.columns), want.max_rows, total_rows)


def _has_all(n_rows: int, target: int, total_rows: int | None) -> bool:
    return bool(target and n_rows >= target) or n_rows == total_rows
