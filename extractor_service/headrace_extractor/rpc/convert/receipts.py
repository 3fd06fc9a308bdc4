"""Parity receipts as messages."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_pb2 as pb
from headrace_extractor.sets.receipt import ParityReceipt


def receipt_to_pb(receipt: ParityReceipt | None) -> pb.ParityReceipt | None:
    """A set's receipt for the columns of one extraction."""
    if receipt is None:
        return None
    columns = [
        pb.ColumnParity(
            name=column.name,
            max_difference=column.max_difference,
            min_cosine=column.min_cosine,
            max_relative_error=column.max_relative_error,
        )
        for column in receipt.columns
    ]
    return pb.ParityReceipt(n_rows=receipt.n_rows, columns=columns)
