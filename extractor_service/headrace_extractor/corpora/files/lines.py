"""Reads files in UTF-8 line by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from headrace_extractor.corpora.files import contents
from headrace_extractor.corpora.files.contents import malformed

# A JSON line may hold the text in escapes, and other fields. A longer line is most likely a file without line ends.
MAX_LINE_BYTES = 2 * contents.MAX_DOCUMENT_BYTES
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 64 * 1024
_BLOCK_BYTES = 1024 * 1024


class Line(NamedTuple):
    """A line of a file."""

    number: int  # from 1
    content: bytes  # valid UTF-8, with its line end


def lines(file: BinaryIO) -> Iterator[Line]:
    """Yields the lines of a file from where it stands.

    They end at line feeds only: str.splitlines would cut at form feeds and other characters too. In a file that has
    carriage returns and, for its first 64 KB, no line feed, they end at carriage returns.
    """
    head = file.read(_HEAD_BYTES)
    file.seek(-len(head), 1)
    check_encoding(head)
    offset = 0
    found = (
        ended_by_cr(file)
        if b"\r" in head and b"\n" not in head
        else iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    )
    for number, raw in enumerate(found, 1):
        if len(raw) > MAX_LINE_BYTES:
            raise malformed(f"Line {number} is longer than {MAX_LINE_BYTES} bytes; is the format right?", line=number)
        try:
            raw.decode()
        except UnicodeDecodeError as exc:
            raise malformed(
                f"Line {number} is not UTF-8 at byte {offset + exc.start} of the file; convert the file to UTF-8.",
                line=number,
                byte=offset + exc.start,
            ) from exc
        offset += len(raw)
        content = raw.removeprefix(_BOM) if number == 1 else raw
        if content:
            yield Line(number, content)


def ended_by_cr(file: BinaryIO) -> Iterator[bytes]:
    """Yields lines with the carriage returns at their ends."""
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\r")
        for line in whole:
            yield line + b"\r"
        if len(rest) > MAX_LINE_BYTES:
            break
    if rest:
        yield rest


def check_encoding(head: bytes) -> None:
    """Raises CorpusMalformed for UTF-16 without a mark: as UTF-8, its western letters are letters and NULs in turns."""
    n_pairs, n_even, n_odd = len(head) // 2, head[0::2].count(0), head[1::2].count(0)
    few, many = sorted((n_even, n_odd))
    if n_pairs >= 2 and 4 * many > n_pairs and 10 * few < many:
        first = head.index(0)
        raise malformed(
            f"Every other byte from byte {first} of the file is 0, as in UTF-16; convert the file to UTF-8.", byte=first
        )
