"""Cuts Parquet files into documents, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace_extractor.corpora.files import contents
from headrace_extractor.corpora.files.contents import (
    TOKEN_LIMIT,
    beyond_int32,
    chat_content,
    malformed,
    missing_column,
    too_large,
)
from headrace_extractor.corpora.spec import DocumentKind

_BATCH_BYTES = 8 * 1024 * 1024  # The aim for a batch of rows: a whole row group may be gigabytes.
_BUFFER_BYTES = 1024 * 1024
_MAX_BATCH_ROWS = 4096
# Arrow makes objects of each.
_MAX_COLUMNS = 10_000

# Yields documents from the values of a batch, the number of its first row, and the column's name.
_Read: TypeAlias = Callable[[Any, int, str], Iterator[bytes]]


def parse_parquet(file: BinaryIO, column: str, kind: DocumentKind) -> Iterator[bytes]:
    """Yields the documents of one column; raises CorpusMalformed with `row` counted from 0.

    `a.b` is the field `b` of the struct column `a`, unless a column has that whole name.
    """
    with _arrow_errors():
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    if parquet.metadata.num_columns > _MAX_COLUMNS:
        raise malformed(f"The file has more than {_MAX_COLUMNS} columns; keep those that are needed.")
    schema = parquet.schema_arrow
    path = [column] if column in schema.names else column.split(".")
    if schema.names.count(column) > 1:
        raise malformed(f"The file has more than one column {column!r}; rename one.")
    found = _type_at(schema, path)
    if found is None:
        raise missing_column(column, schema.names, "The file")
    read = _READS[kind]
    _check_type(found, column, kind)
    if kind == DocumentKind.TEXT:
        # Texts that repeat stay single in memory: a dictionary of one text may stand for a million rows.
        with _arrow_errors():
            parquet = pq.ParquetFile(
                file, pre_buffer=False, buffer_size=_BUFFER_BYTES, read_dictionary=[".".join(path)]
            )
    row = 0
    for group in range(parquet.num_row_groups):
        for values in _batches(parquet, group, path):
            yield from read(values, row, column)
            row += len(values)


def _batches(parquet: Any, group: int, path: Sequence[str]) -> Iterator[Any]:
    metadata = parquet.metadata.row_group(group)
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    n_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))
    with _arrow_errors():
        batches = parquet.iter_batches(n_rows, row_groups=[group], columns=[".".join(path)], use_threads=False)
    while True:
        with _arrow_errors():
            batch = next(batches, None)
            if batch is None:
                return
            values = batch.column(0)
            for name in path[1:]:
                values = pc.struct_field(values, [name])
            if pa.types.is_dictionary(values.type) and not _is_text(values.type.value_type):
                values = values.dictionary_decode()
        yield values


def _type_at(schema: Any, path: Sequence[str]) -> Any:
    """Returns the type of a column, or of a field within structs; None if the schema does not have it."""
    if schema.names.count(path[0]) != 1:
        return None
    found = schema.field(path[0]).type
    for name in path[1:]:
        if not pa.types.is_struct(found) or found.get_field_index(name) < 0:
            return None
        found = found.field(name).type
    return found


def _check_type(found: Any, column: str, kind: DocumentKind) -> None:
    found = found.value_type if pa.types.is_dictionary(found) else found
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    fits, what = {
        DocumentKind.TEXT: (_is_text(found), "the text must be strings, or bytes in UTF-8"),
        DocumentKind.CHAT: (is_list and pa.types.is_struct(found.value_type), "a conversation is a list of structs"),
        DocumentKind.TOKEN_IDS: (is_list and pa.types.is_integer(found.value_type), "token ids are lists of integers"),
    }[kind]
    if not fits:
        raise malformed(f"The column {column!r} is of type {found}; {what}.", type=found)


def _is_text(found: Any) -> bool:
    """Returns whether values of a type may be text: strings, or bytes, which some writers store texts as."""
    strings = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    return bool(
        strings or pa.types.is_binary(found) or pa.types.is_large_binary(found) or pa.types.is_binary_view(found)
    )


def _texts(values: Any, first: int, column: str) -> Iterator[bytes]:
    for row, value in enumerate(_bytes_of(values), first):
        data: bytes | None = value.as_py()
        if data is None:
            raise _null(row, column, "the text must be a string")
        if len(data) > contents.MAX_DOCUMENT_BYTES:
            raise too_large(f"The text in row {row}, counted from 0,", row=row)
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            raise malformed(
                f"Row {row}, counted from 0, is not UTF-8 at byte {exc.start} of its text; repair the file.",
                row=row,
                byte=exc.start,
            ) from exc
        yield data


def _bytes_of(values: Any) -> Iterator[Any]:
    """Yields the values as scalars of bytes, which `_texts` checks; of a dictionary, each text is in memory once."""
    with _arrow_errors():
        if not pa.types.is_dictionary(values.type):
            yield from values.cast(pa.large_binary())
            return
        texts, indices = values.dictionary.cast(pa.large_binary()), values.indices
    for index in indices:
        place = index.as_py()
        if place is not None and not 0 <= place < len(texts):  # Arrow's reader does not look.
            raise malformed("The file is no readable Parquet: a dictionary lacks a text that it is asked for.")
        yield pa.scalar(None, pa.large_binary()) if place is None else texts[place]


def _chats(values: Any, first: int, column: str) -> Iterator[bytes]:
    for row, value in enumerate(values, first):
        with _arrow_errors():
            messages = value.as_py()
        if messages is None:
            raise _null(row, column, "a conversation is a list of messages")
        yield chat_content(messages, column, ("row", row))


def _token_lists(values: Any, first: int, column: str) -> Iterator[bytes]:
    for row, value in enumerate(values, first):
        if not value.is_valid:
            raise _null(row, column, "token ids are a list of integers")
        if value.values.null_count:
            raise _null(row, column, "each token id must be an integer")
        tokens = value.values.to_numpy(zero_copy_only=False)
        where = f"Row {row}, counted from 0,"
        if tokens.size * 4 > contents.MAX_DOCUMENT_BYTES:
            raise too_large(where, row=row)
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= TOKEN_LIMIT):
            raise beyond_int32(where, row=row)
        yield tokens.astype(np.dtype("<i4")).tobytes()


def _null(row: int, column: str, rule: str) -> Exception:
    return malformed(f"Row {row}, counted from 0, is null in {column!r}; {rule}.", row=row)


_READS: dict[DocumentKind, _Read] = {
    DocumentKind.TEXT: _texts,
    DocumentKind.CHAT: _chats,
    DocumentKind.TOKEN_IDS: _token_lists,
}


@contextmanager
def _arrow_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise  # Arrow's own is an ArrowException too.
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise malformed(f"The file is no readable Parquet: {str(exc).strip()[:500]}") from exc
