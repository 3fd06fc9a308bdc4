"""A run of rows from one message or file: views, no copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace_client.values import PROVENANCE_COLUMNS, Column, Dtype

# numpy has no bfloat16 and no float8: their bits come as unsigned integers.
_NUMPY_DTYPES: Mapping[Dtype, npt.DTypeLike] = {
    Dtype.FLOAT32: np.dtype("<f4"),
    Dtype.FLOAT16: np.dtype("<f2"),
    Dtype.BFLOAT16: np.dtype("<u2"),
    Dtype.INT32: np.dtype("<i4"),
    Dtype.FLOAT8_E4M3: np.dtype("u1"),
    Dtype.INT8: np.dtype("i1"),
}


class InFiles(Protocol):
    """Rows that lie in files and are not in memory yet."""

    def read_into(self, column: int, offset: int, rows: memoryview) -> None:
        """Fills memory with rows of a column, by its number, from the chunk's row `offset` on. Raises DataLoss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationChunk:
    """Rows `first_row` to `end_row` of some columns; `buffers` are read-only, one for each column.

    Rows `in_files` are read when a buffer is first asked for, which raises DataLoss if the files have changed.

    `place` is the place of the first row in the reading order: its number, unless rows are shuffled or sharded.
    """

    first_row: int
    n_rows: int
    place: int
    columns: tuple[Column, ...]
    buffers: Sequence[memoryview]
    size_bytes: int
    in_files: InFiles | None = None

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.n_rows

    @property
    def end_place(self) -> int:
        """One past the last place."""
        return self.place + self.n_rows

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype name of each column, to tell the bits of bfloat16 from integers."""
        return {column.name: column.dtype.value for column in self.columns}

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """A read-only view of each column: `[rows, width]`, or `[rows]` for the three provenance columns."""
        return {column.name: self._array(at) for at, column in enumerate(self.columns)}

    def array(self, name: str) -> npt.NDArray[Any]:
        """The view of one column. Raises KeyError for a column that is not in the stream."""
        for at, column in enumerate(self.columns):
            if column.name == name:
                return self._array(at)
        raise KeyError(name)

    def _array(self, at: int) -> npt.NDArray[Any]:
        column = self.columns[at]
        flat = np.frombuffer(self.buffers[at], dtype=_NUMPY_DTYPES[column.dtype])
        return flat if column.name in PROVENANCE_COLUMNS else flat.reshape(self.n_rows, column.width)
