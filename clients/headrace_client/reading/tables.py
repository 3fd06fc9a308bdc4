"""Rows of some columns as torch tensors, filled straight from chunks: the only copy on the way to a batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from headrace_client.errors import DataLoss, InvalidArgument
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.values import PROVENANCE_COLUMNS, Dtype

_TORCH_SERIAL_ELEMENTS = 32_768  # torch divides larger operations among its threads (at::internal::GRAIN_SIZE).
_TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.INT32: torch.int32,
    Dtype.FLOAT8_E4M3: torch.float8_e4m3fn,
    Dtype.INT8: torch.int8,
}


def view(
    columns: Sequence[str], chunk: ActivationChunk, offset: int, n_rows: int, dtype: torch.dtype | None
) -> dict[str, torch.Tensor] | None:
    """Rows of a chunk as tensors that share its memory; None where a column has to be copied, or is not in memory."""
    if chunk.in_files is not None:
        return None  # Reading them into a batch is their first copy.
    by_name = {column.name: at for at, column in enumerate(chunk.columns)}
    tensors: dict[str, torch.Tensor] = {}
    for name in columns:
        if name not in by_name:
            return None
        column = chunk.columns[by_name[name]]
        rows = _rows(chunk, by_name[name], offset, n_rows)
        converted = column.scale_column or (name not in PROVENANCE_COLUMNS and rows.dtype != (dtype or rows.dtype))
        if converted or rows.data_ptr() % rows.element_size():  # A message's payload may begin anywhere.
            return None
        tensors[name] = rows
    return tensors


class Table:
    """Room for `capacity` rows of `columns`; hookpoints in `dtype`, or as they are stored.

    `limits` are the largest norms of rows to keep, by column. `n_dropped` counts the rows that exceeded one.
    """

    def __init__(
        self,
        columns: Sequence[str],
        capacity: int,
        dtype: torch.dtype | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self.n_rows = 0
        self.n_dropped = 0
        self.capacity = capacity
        self.tensors: dict[str, torch.Tensor] = {}
        self._columns = columns
        self._dtype = dtype
        self._limits = limits or {}

    @property
    def full(self) -> bool:
        """True when no row fits in any more."""
        return self.n_rows == self.capacity

    def take(self, chunk: ActivationChunk, offset: int, most: int) -> int:
        """Copies up to `most` rows of a chunk from `offset` on. Returns how many were read, dropped rows included."""
        n_rows = min(self.capacity - self.n_rows, chunk.n_rows - offset, most)
        by_name = {column.name: at for at, column in enumerate(chunk.columns)}
        for name in self._columns:
            if name not in by_name:
                raise DataLoss(f"the server left out column {name!r}")
            column = chunk.columns[by_name[name]]
            if name not in self.tensors:
                own = torch.float32 if column.scale_column else _TORCH_DTYPES[column.dtype]
                provenance = name in PROVENANCE_COLUMNS
                shape = (self.capacity,) if provenance else (self.capacity, column.width)
                self.tensors[name] = torch.empty(shape, dtype=own if provenance else self._dtype or own)
            scale = None
            if column.scale_column:
                if column.scale_column not in by_name:
                    raise InvalidArgument(
                        f"values of {name} need their scale: ask for column {column.scale_column!r} too",
                        fields={"columns": column.scale_column},
                    )
                scale = _rows(chunk, by_name[column.scale_column], offset, n_rows)
            part = self.tensors[name][self.n_rows : self.n_rows + n_rows]
            if chunk.in_files is not None and scale is None and part.dtype == _TORCH_DTYPES[column.dtype]:
                # Straight into the batch, which is the only copy.
                chunk.in_files.read_into(by_name[name], offset, part.view(torch.uint8).numpy().reshape(-1).data)
            else:
                _copy(part, _rows(chunk, by_name[name], offset, n_rows), scale)
        self.n_rows += self._keep(n_rows) if self._limits else n_rows
        return n_rows

    def gather(self, rows: NDArray[np.int64], into: Table) -> None:
        """Appends rows of this table, by number, to another one of the same columns."""
        end = into.n_rows + len(rows)
        for name, tensor in self.tensors.items():
            if name not in into.tensors:
                into.tensors[name] = torch.empty((into.capacity, *tensor.shape[1:]), dtype=tensor.dtype)
            # numpy works in this thread alone; torch would use all its threads. With `clip` numpy needs no copy of its
            # own, and no number is out of range.
            np.take(_raw(tensor), rows, axis=0, out=_raw(into.tensors[name][into.n_rows : end]), mode="clip")
        into.n_rows = end

    def cut(self) -> dict[str, torch.Tensor]:
        """The rows so far, by column."""
        if self.full:
            return self.tensors
        return {name: tensor[: self.n_rows] for name, tensor in self.tensors.items()}

    def _keep(self, n_rows: int) -> int:
        """Drops the rows just copied that are too long, and closes the gaps; returns how many stay."""
        end = self.n_rows + n_rows
        keep = np.ones(n_rows, np.bool_)
        for name, limit in self._limits.items():
            rows = self.tensors[name][self.n_rows : end]
            at_once = max(1, _TORCH_SERIAL_ELEMENTS // rows.shape[1])
            for at in range(0, n_rows, at_once):
                norms = torch.linalg.vector_norm(rows[at : at + at_once].float(), dim=1).numpy()
                keep[at : at + at_once] &= norms <= limit  # NaN compares as False: such a row is never kept.
        n_kept = int(keep.sum())
        if n_kept < n_rows:
            kept = np.flatnonzero(keep)
            for tensor in self.tensors.values():
                part = _raw(tensor[self.n_rows : end])
                part[:n_kept] = part[kept]
        self.n_dropped += n_rows - n_kept
        return n_kept


def _raw(tensor: torch.Tensor) -> NDArray[np.void]:
    """The rows of a contiguous tensor as opaque bytes."""
    n_bytes = tensor.element_size() * (tensor[0].numel() if len(tensor) else 1)
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.view(np.dtype((np.void, n_bytes)))


def _copy(part: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Copies in this thread alone, converting where dtypes differ and multiplying 8-bit rows by their scale.

    torch would divide a larger copy among its OpenMP threads, which takes forty times longer while the trainer's other
    threads hold the cores; one thread copies faster than any network delivers.
    """
    if scale is None and part.dtype == rows.dtype:
        np.copyto(part.view(torch.uint8).numpy(), rows.view(torch.uint8).numpy())
        return
    at_once = max(1, _TORCH_SERIAL_ELEMENTS // max(1, rows.numel() // len(rows)))
    for at in range(0, len(rows), at_once):
        some = part[at : at + at_once].copy_(rows[at : at + at_once])
        if scale is not None:  # While the rows are in the core's cache.
            some.mul_(scale[at : at + at_once])


def _rows(chunk: ActivationChunk, at: int, offset: int, n_rows: int) -> torch.Tensor:
    """A view of some rows of a column in the message; nothing writes to it."""
    column = chunk.columns[at]
    flat = torch.frombuffer(
        chunk.buffers[at],
        dtype=_TORCH_DTYPES[column.dtype],
        count=n_rows * column.width,
        offset=offset * column.row_bytes,
    )
    return flat if column.name in PROVENANCE_COLUMNS else flat.view(n_rows, column.width)


@cache
def silence_read_only_warning() -> None:
    """Triggers torch's only warning about read-only memory, and suppresses it: such tensors are only copied from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
