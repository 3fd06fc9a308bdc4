"""`ActivationChunk` messages, framed and parsed by hand around their payload.

A message is a `headrace.extractor.v1.StreamActivationsResponse` with a `chunk`: any generated stub reads and writes it.
It is framed by hand because generated code copies the payload twice on each side. The payload is last and starts at a
multiple of `ALIGNMENT` from the start of the message, so that columns are views of the message, not copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

ALIGNMENT = 64

# Field numbers and wire types: (number << 3) | type, where type 0 is a varint and 2 length-delimited.
_OUTER_CHUNK = (15 << 3) | 2
_FIRST_ROW = (1 << 3) | 0
_N_ROWS = (2 << 3) | 0
_COLUMN_OFFSETS = (3 << 3) | 2
_PADDING = (4 << 3) | 2
_POSITION = (5 << 3) | 0
_PAYLOAD = (15 << 3) | 2

_ZEROS = bytes(ALIGNMENT)


class FrameError(ValueError):
    """The message begins like a chunk and can't be parsed."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A parsed chunk; `payload` is a view of its message.

    `position` is the place of the first row in the reading order; for a single sequential shard it is 0.
    """

    first_row: int
    n_rows: int
    column_offsets: tuple[int, ...]
    payload: memoryview
    position: int = 0

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.n_rows

    def column(self, at: int, row_bytes: int) -> memoryview:
        """Returns the bytes of the column that has number `at` in the stream's header."""
        start = self.column_offsets[at]
        view = self.payload[start : start + self.n_rows * row_bytes]
        if len(view) != self.n_rows * row_bytes:
            raise FrameError(f"column {at} of rows {self.first_row}.. is cut short")
        return view


def encode_chunk(first_row: int, n_rows: int, columns: Sequence[memoryview], position: int = 0) -> bytes:
    """Frames rows as one message: the only copy of the columns on the way to the transport.

    A message without columns announces a range of rows that the client maps itself.
    """
    offsets, parts, payload_bytes = _lay_out(columns)
    head = bytearray()
    if first_row:
        head.append(_FIRST_ROW)
        _put_varint(head, first_row)
    if n_rows:
        head.append(_N_ROWS)
        _put_varint(head, n_rows)
    if offsets:
        packed = bytearray()
        for offset in offsets:
            _put_varint(packed, offset)
        head.append(_COLUMN_OFFSETS)
        _put_varint(head, len(packed))
        head += packed
    tail = bytearray()
    if position:
        tail.append(_POSITION)
        _put_varint(tail, position)
    if payload_bytes:
        tail.append(_PAYLOAD)
        _put_varint(tail, payload_bytes)
    outer, padding = _outer_and_padding(len(head), len(tail), payload_bytes)
    return b"".join((outer, head, padding, tail, *parts))


def decode_chunk(message: bytes | memoryview) -> Chunk | None:
    """Parses a message into views of it; returns None if it holds something other than a chunk.

    Raises FrameError if the message is damaged.
    """
    if not message or message[0] != _OUTER_CHUNK:
        return None
    try:
        length, at = _get_varint(message, 1)
        if at + length != len(message):
            return None  # Several fields: the caller parses these with a generated stub.
        return _decode_fields(message, at)
    except IndexError as exc:
        raise FrameError("a chunk ends in the middle of a field") from exc


def _decode_fields(message: bytes | memoryview, at: int) -> Chunk:
    first_row = n_rows = position = 0
    offsets: list[int] = []
    payload = memoryview(b"")
    while at < len(message):
        tag, at = _get_varint(message, at)
        if tag & 7 == 0:
            value, at = _get_varint(message, at)
            first_row = value if tag == _FIRST_ROW else first_row
            n_rows = value if tag == _N_ROWS else n_rows
            position = value if tag == _POSITION else position
            offsets += [value] if tag == _COLUMN_OFFSETS & ~7 else []  # Not packed: protobuf allows both.
            continue
        if tag & 7 != 2:
            raise FrameError(f"wire type {tag & 7} in a chunk")
        length, at = _get_varint(message, at)
        end = at + length
        if end > len(message):
            raise FrameError("a chunk ends in the middle of a field")
        if tag == _PAYLOAD:
            payload = memoryview(message)[at:end].toreadonly()
        elif tag == _COLUMN_OFFSETS:
            while at < end:
                value, at = _get_varint(message, at)
                offsets.append(value)
        at = end
    return Chunk(first_row, n_rows, tuple(offsets), payload, position)


def _lay_out(columns: Sequence[memoryview]) -> tuple[list[int], list[bytes | memoryview], int]:
    """Returns the offset of each column, the payload's parts (columns and gaps between them), and its length."""
    offsets: list[int] = []
    parts: list[bytes | memoryview] = []
    end = 0
    for column in columns:
        gap = -end % ALIGNMENT
        if gap:
            parts.append(_ZEROS[:gap])
        offsets.append(end + gap)
        parts.append(column)
        end += gap + memoryview(column).nbytes
    return offsets, parts, end


@lru_cache(maxsize=256)
def _outer_and_padding(n_head: int, n_tail: int, payload_bytes: int) -> tuple[bytes, bytes]:
    """Returns the outer tag and length, and the padding field that puts the payload on a multiple of `ALIGNMENT`.

    Cached: nearly all chunks of a stream have the same three lengths.
    """
    # Padding can make the outer length one byte longer. This skips one residue, so a second round of 64 may be needed.
    for n_padding in range(2 * ALIGNMENT):
        n_field = 2 + n_padding if n_padding else 0
        outer = bytearray((_OUTER_CHUNK,))
        _put_varint(outer, n_head + n_field + n_tail + payload_bytes)
        if not payload_bytes or (len(outer) + n_head + n_field + n_tail) % ALIGNMENT == 0:
            padding = bytes((_PADDING, n_padding)) + bytes(n_padding) if n_padding else b""
            return bytes(outer), padding
    raise AssertionError("125 consecutive lengths, with one gap, hold a multiple of 64")


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)


def _get_varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """Returns a varint's value and the offset behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise FrameError("a varint is longer than ten bytes")
