"""Cuts rows into contexts of one length, for formats of fixed shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Columns = Mapping[str, npt.NDArray[Any]]  # Rows, by column.


@dataclass(slots=True)
class ContextCutter:
    """Cuts tables of rows, in row order, into tables of contexts `[n, context_size, ...]`.

    A context has rows of one document, or of one piece of a split document. Contexts follow one another from its first
    row on; rows at its end that fill no context are left out and counted. With `join`, documents
    follow one another in a context, and only the very last rows are left out. Tables need `document` and `position`.
    """

    context_size: int
    join: bool = False
    n_rows: int = 0
    n_contexts: int = 0
    _rest: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def n_left_out(self) -> int:
        """Rows so far that are in no context, including rows that may still be in the next one."""
        return self.n_rows - self.n_contexts * self.context_size

    def cut(self, tables: Iterable[Columns]) -> Iterator[Columns]:
        """Yields the contexts that each table completes; nothing for a table that completes none."""
        for table in tables:
            self.n_rows += len(table["document"])
            rows = {
                name: np.concatenate([self._rest[name], part]) if self._rest else part for name, part in table.items()
            }
            picked, rest_from = self._pick(rows)
            self._rest = {name: part[rest_from:].copy() for name, part in rows.items()}
            if len(picked):
                self.n_contexts += len(picked)
                yield {name: part[picked] for name, part in rows.items()}

    def _pick(self, rows: Columns) -> tuple[npt.NDArray[np.int64], int]:
        """Row numbers `[n, context_size]` of the contexts, and the first row that may be in one later."""
        size, end = self.context_size, len(rows["document"])
        first_rows = [0]
        if not self.join:
            document, position = rows["document"], rows["position"]
            # Positions that don't grow begin another piece of a long document.
            begins = (document[1:] != document[:-1]) | (position[1:] <= position[:-1])
            first_rows += [int(row) + 1 for row in np.flatnonzero(begins)]
        starts: list[int] = []
        rest_from = end
        for first, behind in zip(first_rows, [*first_rows[1:], end], strict=True):
            n_whole = (behind - first) // size
            starts += range(first, first + n_whole * size, size)
            rest_from = first + n_whole * size
        at = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(size)
        return at, rest_from
