"""Writes the rows of a batch into the log's mapped memory: one copy, with the conversion to the storage dtype."""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# R rows · D model width

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from headrace_extractor.errors import FieldInvalid, NonFinite
from headrace_extractor.runner.passes.forward import BatchRows
from headrace_extractor.runner.passes.quantized_rows import quantize_rows
from headrace_log.layout import DOCUMENT, POSITION, TOKEN_ID, ColumnSpec, Dtype
from headrace_log.writer import Reservation

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.INT8: torch.int8,
    Dtype.FLOAT8_E4M3: torch.float8_e4m3fn,
}


class RowSource:
    """The kept rows of one batch, ready to be copied in parts. `columns` are the hookpoints', without their scales."""

    def __init__(self, rows: BatchRows, columns: Sequence[ColumnSpec], *, allow_non_finite: bool) -> None:
        self._activations = rows.activations
        self._index = rows.index
        self._columns = columns
        self._allow_non_finite = allow_non_finite
        keep = rows.batch.keep
        self._provenance = {
            TOKEN_ID.name: rows.batch.token_ids[keep],
            DOCUMENT.name: rows.batch.documents[keep],
            POSITION.name: rows.batch.positions[keep],
        }
        self.n_rows = len(self._provenance[TOKEN_ID.name])
        for column in columns:
            width = rows.activations[column.name].shape[1]
            if width != column.width:
                raise FieldInvalid(
                    f"Column {column.name} is {column.width} wide, the model gives {width} values; the set was made "
                    "for another model, delete it."
                )

    def origins(self, first: int, n_rows: int) -> dict[str, np.ndarray]:
        """Returns token, document and position of rows from `first` on."""
        return {name: values[first : first + n_rows] for name, values in self._provenance.items()}

    def copy_to(self, reservation: Reservation, first: int) -> dict[str, int]:
        """Fills the reservation with rows from `first` on; returns how many values are not finite, by column.

        Columns without such a value are left out. Raises NonFinite for these values unless they are allowed.
        """
        end = first + reservation.n_rows
        for name, values in self._provenance.items():
            if name in reservation.columns:  # Not where columns are added to rows that exist.
                np.frombuffer(reservation.columns[name], dtype=np.int32)[:] = values[first:end]
        counts = {}
        for column in self._columns:
            memory = torch.frombuffer(reservation.columns[column.name], dtype=TORCH_DTYPES[column.dtype])
            stored_RD = memory.view(reservation.n_rows, column.width)
            acts_RD = self._activations[column.name]
            if column.scale_column:
                rows_RD = acts_RD[first:end] if self._index is None else acts_RD.index_select(0, self._index[first:end])
                if rows_RD.dtype == stored_RD.dtype:  # Quantized on the device already.
                    values_RD, scale_R1 = rows_RD, self._activations[column.scale_column][first:end]
                else:
                    values_RD, scale_R1 = quantize_rows(rows_RD, stored_RD.dtype)
                stored_RD.copy_(values_RD)
                scales = torch.frombuffer(reservation.columns[column.scale_column], dtype=torch.float32)
                scales.copy_(scale_R1.flatten())
                # One value that is not finite leaves no value of its row readable.
                counts[column.name] = self._count_non_finite(column, scale_R1, first) * column.width
                continue
            if self._index is None:
                stored_RD.copy_(acts_RD[first:end])
            elif stored_RD.dtype == acts_RD.dtype:
                torch.index_select(acts_RD, 0, self._index[first:end], out=stored_RD)
            else:
                stored_RD.copy_(acts_RD.index_select(0, self._index[first:end]))
            counts[column.name] = self._count_non_finite(column, stored_RD, first)
        return {name: count for name, count in counts.items() if count}

    def _count_non_finite(self, column: ColumnSpec, stored_RD: Tensor, first: int) -> int:
        """Counts values that are NaN or infinite, after the conversion: a value may be finite before it only."""
        # NaN and infinity show in the extremes; comparing every value takes ten times as long.
        if all(bool(extreme.isfinite()) for extreme in torch.aminmax(stored_RD)):
            return 0
        finite_RD = torch.isfinite(stored_RD)
        if self._allow_non_finite:
            return int((~finite_RD).sum())
        # Behind the first attention a NaN is in every row of its sequence, because masked positions are multiplied by
        # zero: the position named here is the first of them, and may be another than its origin.
        row = first + int((~finite_RD.all(1)).nonzero()[0])
        where: Mapping[str, str] = {
            "hookpoint": column.name,
            "document": str(self._provenance[DOCUMENT.name][row]),
            "position": str(self._provenance[POSITION.name][row]),
        }
        raise NonFinite(
            f"{column.name} has NaN or infinite values at position {where['position']} of document {where['document']} "
            f"stored as {column.dtype}; try a storage or compute dtype of wider range, or allow_non_finite.",
            metadata=where,
        )
