"""Parity receipts: messages to values."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_pb2 as pb
from headrace_client.values import ColumnParity, ParityReceipt


def receipt_from_pb(message: pb.Extraction) -> ParityReceipt | None:
    """Reads an extraction's receipt; None if it has none yet."""
    if not message.receipt.columns:
        return None
    columns = tuple(
        ColumnParity(
            name=column.name,
            max_difference=column.max_difference,
            min_cosine=column.min_cosine,
            max_relative_error=column.max_relative_error,
        )
        for column in message.receipt.columns
    )
    return ParityReceipt(n_rows=message.receipt.n_rows, columns=columns)
