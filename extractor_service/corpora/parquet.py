"""Cuts Parquet files into documents, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from extractor_service.corpora.parsers import MAX_DOCUMENT_BYTES, malformed, missing_column, too_large

_BATCH_BYTES = 8 * 1024 * 1024  # Aimed at: a row group may be gigabytes.
_MAX_BATCH_ROWS = 4096


def parse_parquet(file: BinaryIO, column: str) -> Iterator[bytes]:
    """Yields the strings of one column; raises CorpusMalformed with `row` counted from 0."""
    with _arrow_errors():
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1024 * 1024)
    _check_column(parquet.schema_arrow, column)
    row = 0
    for group in range(parquet.num_row_groups):
        for values in _batches(parquet, group, column):
            for i in range(len(values)):
                yield _text_bytes(values[i], row, column)
                row += 1


def _batches(parquet: Any, group: int, column: str) -> Iterator[Any]:
    metadata = parquet.metadata.row_group(group)
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    n_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))
    with _arrow_errors():
        batches = parquet.iter_batches(n_rows, row_groups=[group], columns=[column], use_threads=False)
    while True:
        with _arrow_errors():
            batch = next(batches, None)
            values = None if batch is None else _as_binary(batch.column(0))
        if values is None:
            return
        yield values


def _as_binary(values: Any) -> Any:
    """Decodes dictionaries; as binary, values come out as bytes and are checked below."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.large_binary())


def _check_column(schema: Any, column: str) -> None:
    if column not in schema.names:
        raise missing_column(column, schema.names, "The file")
    if schema.names.count(column) > 1:
        raise malformed(f"The file has more than one column {column!r}; rename one.")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise malformed(f"The column {column!r} is of type {kind}; the text must be strings.", type=kind)


def _text_bytes(value: Any, row: int, column: str) -> bytes:
    data: bytes | None = value.as_py()
    if data is None:
        raise malformed(f"Row {row}, counted from 0, is null in {column!r}; the text must be a string.", row=row)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise too_large(f"The text in row {row}, counted from 0,", row=row)
    try:
        data.decode()
    except UnicodeDecodeError as exc:
        raise malformed(
            f"Row {row}, counted from 0, is not UTF-8 at byte {exc.start} of its text; repair the file.",
            row=row,
            byte=exc.start,
        ) from exc
    return data


@contextmanager
def _arrow_errors() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise malformed(f"The file is no readable Parquet: {str(exc).strip()[:500]}") from exc
