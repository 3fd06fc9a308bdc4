"""Cuts UTF-8 text, JSON lines and CSV into documents; `parquet` and `arrays` cut the other formats.

Every parser here is a generator of documents as UTF-8 bytes, reads the file once and forwards, and holds one document
at a time. Input that it can't read raises CorpusMalformed with `line` (counted from 1) and, for broken UTF-8, `byte`
(the offset in the file). Text is never altered inside a document; a line end next to a cut belongs to no document, and
a byte order mark at the start of the file to no text. `lines` reads lines, `json_arrays` files that are one array.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from headrace_extractor.corpora.files import contents
from headrace_extractor.corpora.files.arrays import NPY_MAGIC, parse_npy
from headrace_extractor.corpora.files.contents import (
    Content,
    content_of,
    json_type,
    malformed,
    missing_column,
    too_large,
    value_at,
)
from headrace_extractor.corpora.files.json_arrays import LONG_BYTES, check_structure, is_array, parse_array
from headrace_extractor.corpora.files.lines import Line, lines
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec, DocumentKind, TextSplit

_PARQUET_MAGIC = b"PAR1"


def parse(file: BinaryIO, spec: CorpusSpec, file_name: str = "") -> Iterator[bytes]:
    """Yields the documents of an open file, in order; raises FieldInvalid if its format is unknown."""
    kind = spec.kind(file_name)
    content = content_of(kind)
    match spec.file_format(file_name):
        case CorpusFormat.TXT:
            return parse_txt(file, spec.text_split)
        case CorpusFormat.JSONL:
            return parse_jsonl(file, spec.text_column, content)
        case CorpusFormat.CSV:
            return parse_csv(file, spec.text_column)
        case CorpusFormat.PARQUET:
            return _parse_parquet(file, spec.text_column, kind)
        case CorpusFormat.TOKEN_IDS:
            return _parse_token_ids(file, spec.text_column)


def _parse_token_ids(file: BinaryIO, column: str) -> Iterator[bytes]:
    """Takes the format from the first bytes of the file: NumPy, Parquet, or else JSON lines."""
    magic = file.read(len(NPY_MAGIC))
    file.seek(0)
    if magic == NPY_MAGIC:
        return parse_npy(file)
    if magic.startswith(_PARQUET_MAGIC):
        return _parse_parquet(file, column, DocumentKind.TOKEN_IDS)
    return parse_jsonl(file, column, contents.token_content)


def _parse_parquet(file: BinaryIO, column: str, kind: DocumentKind) -> Iterator[bytes]:
    # Imported here: pyarrow takes 40 MB and a fifth of a second, which no other format should cost.
    from headrace_extractor.corpora.files.parquet import parse_parquet  # noqa: PLC0415

    return parse_parquet(file, column, kind)


def parse_txt(file: BinaryIO, split: TextSplit) -> Iterator[bytes]:
    """Yields the parts of a text that are not blank."""
    pieces = _SPLITS[split](lines(file))
    return (piece for piece in pieces if piece and not piece.isspace())


def parse_jsonl(file: BinaryIO, key: str, content: Content) -> Iterator[bytes]:
    """Yields the value under `key` of every JSON object; blank lines are skipped.

    `a.b` is the value `b` of the object `a`, unless the object has that whole key. A file that begins with a bracket is
    one array, and its elements count as lines do.
    """
    if is_array(file):
        yield from parse_array(file, key, content)
        return
    for number, line in lines(file):
        if line.isspace():
            continue
        if len(line) > LONG_BYTES:
            check_structure(line.decode(), ("line", number))
        try:
            record = json.loads(line)
        except json.JSONDecodeError as exc:
            raise malformed(
                f"Line {number} is no JSON: {exc.msg} at column {exc.colno}; write one JSON object a line.",
                line=number,
                column=exc.colno,
            ) from exc
        except (RecursionError, ValueError) as exc:  # Nested too deep, or an integer of thousands of digits.
            raise malformed(f"Line {number} can't be read as JSON: {exc}.", line=number) from exc
        if not isinstance(record, dict):
            raise malformed(
                f"Line {number} holds a JSON {json_type(record)}; write one JSON object a line.", line=number
            )
        place = ("line", number)
        yield content(value_at(record, key, place), key, place)


def parse_csv(file: BinaryIO, column: str) -> Iterator[bytes]:
    """Yields the field under the header `column` of every record; empty lines are skipped."""
    # The limit belongs to the whole process; every call sets the same.
    csv.field_size_limit(contents.MAX_DOCUMENT_BYTES)
    records = csv.reader((line.content.decode() for line in lines(file)), strict=True)
    header = _next_record(records)
    if header is None:
        return
    if column not in header:
        raise missing_column(column, header, "The header line", line=1)
    if header.count(column) > 1:
        raise malformed(f"The header names the column {column!r} more than once; rename one.", line=1)
    index = header.index(column)
    while True:
        number = records.line_num + 1
        record = _next_record(records)
        if record is None:
            return
        if not record:
            continue
        if len(record) != len(header):
            raise malformed(
                f"Line {number} has {len(record)} fields and the header {len(header)}; put fields that hold commas,"
                " quotes or line ends in double quotes.",
                line=number,
            )
        yield contents.text_content(record[index], column, ("line", number))


class _Gathered:
    """Collects the bytes of one document, up to the limit."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes, line: int) -> None:
        self._size += len(part)
        if self._size > contents.MAX_DOCUMENT_BYTES:
            raise too_large(f"The document that goes on in line {line}", line=line)
        self._parts.append(part)

    def take(self) -> bytes:
        whole = b"".join(self._parts)
        self._parts, self._size = [], 0
        return whole


def _paragraphs(read: Iterable[Line]) -> Iterator[bytes]:
    gathered = _Gathered()
    for line in read:
        if line.content.isspace():
            yield _without_line_end(gathered.take())
        else:
            gathered.add(line.content, line.number)
    yield _without_line_end(gathered.take())


def _single_lines(read: Iterable[Line]) -> Iterator[bytes]:
    for line in read:
        text = _without_line_end(line.content)
        if len(text) > contents.MAX_DOCUMENT_BYTES:
            raise too_large(f"Line {line.number}", line=line.number)
        yield text


def _pages(read: Iterable[Line]) -> Iterator[bytes]:
    gathered = _Gathered()
    for line in read:
        first, *others = line.content.split(b"\f")
        gathered.add(first, line.number)
        for part in others:
            yield gathered.take().strip(b"\r\n")
            gathered.add(part, line.number)
    yield gathered.take().strip(b"\r\n")


def _whole(read: Iterable[Line]) -> Iterator[bytes]:
    gathered = _Gathered()
    for line in read:
        gathered.add(line.content, line.number)
    yield gathered.take()


_SPLITS = {
    TextSplit.BLANK_LINES: _paragraphs,
    TextSplit.LINES: _single_lines,
    TextSplit.NONE: _whole,
    TextSplit.FORM_FEEDS: _pages,
}


def _without_line_end(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _next_record(records: Any) -> list[str] | None:
    number = records.line_num + 1
    try:
        record: list[str] | None = next(records, None)
    except csv.Error as exc:
        raise malformed(f"The record that starts in line {number} is no CSV: {exc}.", line=number) from exc
    return record
