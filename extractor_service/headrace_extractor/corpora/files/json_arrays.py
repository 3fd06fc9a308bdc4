"""Reads files that are one JSON array, an element at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from headrace_extractor.corpora.files.contents import Content, Place, json_type, malformed, spell, value_at
from headrace_extractor.corpora.files.lines import MAX_LINE_BYTES

_BOM = "\ufeff"
_SPACE = re.compile(r"[ \t\n\r]*")
_HEAD_BYTES = 4096
_BLOCK_BYTES = 1024 * 1024
# Python makes objects of a hundred bytes or more of each part; a text has one, a conversation hundreds.
MAX_PARTS = 1_000_000
LONG_BYTES = 1024 * 1024  # A shorter text can't hold as many parts.


def check_structure(text: str, place: Place) -> None:
    """Raises CorpusMalformed for a long text of so many objects, lists or strings that they take gigabytes."""
    plain = text.replace("\\\\", "").replace('\\"', "")
    n_strings = plain.count('"') // 2
    if n_strings <= MAX_PARTS:
        n_strings += sum(outside.count("[") + outside.count("{") for outside in plain.split('"')[::2])
    if n_strings > MAX_PARTS:
        raise malformed(
            f"{spell(place)} holds more than {MAX_PARTS} objects, lists and strings; is it a whole file? Write one JSON"
            " object a line.",
            place,
        )


def is_array(file: BinaryIO) -> bool:
    """Returns whether a file begins with a bracket, behind white space. The file stands where it stood."""
    head = file.read(_HEAD_BYTES)
    file.seek(-len(head), 1)
    return head.removeprefix(_BOM.encode()).lstrip(b" \t\r\n").startswith(b"[")


def parse_array(file: BinaryIO, key: str, content: Content) -> Iterator[bytes]:
    """Yields the documents of an array: of an object the value under `key`, of text or a list the element itself.

    Elements are rows, counted from 0. Raises CorpusMalformed with `row`, and for what is no JSON also with `line`.
    """
    text = _Text(file)
    text.expect("[")
    row = 0
    if text.next_is("]"):
        return
    while True:
        element = text.element(row)
        place: Place = ("row", row)
        if isinstance(element, dict):
            element = value_at(element, key, place)
        elif not isinstance(element, str | list):
            raise malformed(
                f"{spell(place)} of the array is a JSON {json_type(element)}; write objects or texts.", place
            )
        yield content(element, key, place)
        row += 1
        if text.next_is("]"):
            break
        text.expect(",")
    if not text.at_end():
        raise malformed(f"Line {text.line} goes on behind the array; write one array or one object a line.")


class _Text:
    """The text of a file from a place on, as much of it as an element needs."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = self._n_read = 0
        self._lines_before = 0
        self._ended = False
        self._more()
        self._text = self._text.removeprefix(_BOM)

    @property
    def line(self) -> int:
        """Number of the line that the reader stands in, from 1."""
        return self._line_at(self._at)

    def expect(self, character: str) -> None:
        """Takes a character; raises CorpusMalformed if the next is another."""
        if not self.next_is(character):
            found = "the end of the file" if self.at_end() else repr(self._text[self._at])
            raise malformed(f"Line {self.line} has {found} where the array needs {character!r}.", line=self.line)

    def next_is(self, character: str) -> bool:
        """Takes the character if it is the next but for white space."""
        if self.at_end() or self._text[self._at] != character:
            return False
        self._at += 1
        return True

    def at_end(self) -> bool:
        """Takes white space; returns whether nothing else is left."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return False
            if not self._more():
                return True

    def element(self, row: int) -> object:
        """Takes the next element."""
        if self.at_end():
            raise malformed(f"The array ends within row {row}; copy the file again.", line=self.line, row=row)
        while True:
            try:
                found, self._at = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as exc:
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise malformed(f"Row {row} is longer than {MAX_LINE_BYTES} characters.", row=row) from exc
                if len(self._text) - self._at > LONG_BYTES:
                    check_structure(self._text[self._at :], ("row", row))
                if self._more():
                    continue
                line = self._line_at(exc.pos)
                raise malformed(f"Row {row} is no JSON: {exc.msg} in line {line}.", row=row, line=line) from exc
            except (RecursionError, ValueError) as exc:  # Nested too deep, or an integer of thousands of digits.
                raise malformed(f"Row {row} can't be read as JSON: {exc}.", row=row) from exc
            else:
                return found

    def _more(self) -> bool:
        """Reads on, twice as much of an element each time, and forgets the part that is taken; False at the end."""
        if self._ended:
            return False
        self._lines_before += self._text.count("\n", 0, self._at)
        rest = self._text[self._at :]
        block = self._file.read(max(_BLOCK_BYTES, len(rest)))
        try:
            self._text = rest + self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as exc:
            offset = self._n_read + len(block) - len(exc.object) + exc.start
            raise malformed(f"The file is not UTF-8 at byte {offset}; convert it to UTF-8.", byte=offset) from exc
        self._at = 0
        self._n_read += len(block)
        self._ended = not block
        return bool(block)

    def _line_at(self, at: int) -> int:
        return self._lines_before + self._text.count("\n", 0, at) + 1
