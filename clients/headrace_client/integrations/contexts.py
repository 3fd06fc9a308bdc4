"""Cuts rows into contexts of one length: what formats of fixed shape want."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Table = Mapping[str, npt.NDArray[Any]]


@dataclass(slots=True)
class ContextCutter:
    """Cuts tables of rows, in row order, into tables of contexts `[n, context_size, ...]`.

    A context begins where a document (or a further piece of a long one) does, or where the one before it in the same
    document ended, and has rows of no other; rows that fill none are left out and counted. With `join`, documents
    follow one another in a context, and only the last rows of all are left out. Tables need `document` and `position`.
    """

    context_size: int
    join: bool = False
    n_rows: int = 0
    n_contexts: int = 0
    _rest: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def n_left_out(self) -> int:
        """Rows so far that are in no context; those at hand for the next one among them."""
        return self.n_rows - self.n_contexts * self.context_size

    def cut(self, tables: Iterable[Table]) -> Iterator[Table]:
        """Yields the contexts of each table, at least one at a time."""
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

    def _pick(self, rows: Table) -> tuple[npt.NDArray[np.int64], int]:
        """Row numbers `[n, context_size]` of the contexts, and the first row that may be in one later."""
        size, end = self.context_size, len(rows["document"])
        first_rows = [0] if self.join else [0, *_breaks(rows["document"], rows["position"])]
        starts: list[int] = []
        rest_from = end
        for first, behind in zip(first_rows, [*first_rows[1:], end], strict=True):
            n_whole = (behind - first) // size
            starts += range(first, first + n_whole * size, size)
            rest_from = first + n_whole * size
        at = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(size)
        return at, rest_from


def _breaks(documents: npt.NDArray[Any], positions: npt.NDArray[Any]) -> list[int]:
    """Rows at which a document, or a piece of one, begins; the first row aside."""
    new = (documents[1:] != documents[:-1]) | (positions[1:] <= positions[:-1])
    return [int(row) + 1 for row in np.flatnonzero(new)]
