"""Check sums inside small JSON files, which have no digest elsewhere: a flipped bit can leave valid JSON.

A document without a check sum counts as whole: earlier versions wrote none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

KEY = "crc32"
_MARK = f',"{KEY}":'.encode()


def with_check(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the document with the CRC-32 of its canonical JSON as its last entry."""
    return {**document, KEY: _crc32_of(document)}


def check(document: Mapping[str, Any]) -> None:
    """Raises ValueError if a document has another check sum than its own; layout and order of keys may differ."""
    rest = {key: value for key, value in document.items() if key != KEY}
    if KEY in document and document[KEY] != _crc32_of(rest):
        raise ValueError("its check sum is another one")


def checked_line(document: Mapping[str, Any]) -> bytes:
    """Returns a line of JSON whose last entry is the CRC-32 of the bytes before it."""
    head = json.dumps(document, separators=(",", ":")).encode()[:-1]
    return b"%b%b%d}\n" % (head, _MARK, zlib.crc32(head))


def check_line(line: bytes) -> None:
    """Raises ValueError if a line without its newline has another check sum than its own."""
    head, mark, number = line.rpartition(_MARK)
    if mark and number != b"%d}" % zlib.crc32(head):
        raise ValueError("its check sum is another one")


def _crc32_of(document: Mapping[str, Any]) -> int:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(canonical.encode())
