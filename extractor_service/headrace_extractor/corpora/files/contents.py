"""Turns the values that parsers find into the bytes of documents: texts, conversations, token ids.

Each function takes a value with its column and its place, and raises a CorpusMalformed that names the place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from headrace_extractor.corpora.spec import DocumentKind
from headrace_extractor.errors import CorpusMalformed

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MAX_COLUMNS_NAMED = 20  # in messages
TOKEN_LIMIT = 2**31

# `line` and its number from 1, or `row` and its number from 0. A plain tuple: every document has one.
Place: TypeAlias = tuple[str, int]
Content: TypeAlias = Callable[[Any, str, Place], bytes]


def content_of(kind: DocumentKind) -> Content:
    """Returns the function for documents of a kind."""
    return {
        DocumentKind.TEXT: text_content,
        DocumentKind.CHAT: chat_content,
        DocumentKind.TOKEN_IDS: token_content,
    }[kind]


def text_content(value: Any, column: str, place: Place) -> bytes:
    """Returns a string as UTF-8."""
    if isinstance(value, str):
        return _encoded(value, column, place)
    raise malformed(f"{spell(place)} holds a {json_type(value)} under {column!r}; the text must be a string.", place)


def chat_content(value: Any, column: str, place: Place) -> bytes:
    """Returns a list of messages as JSON, always spelled the same; no bytes for an empty list."""
    if not isinstance(value, list):
        raise malformed(
            f"{spell(place)} holds a {json_type(value)} under {column!r}; a conversation is a list of messages"
            " with `role` and `content`.",
            place,
        )
    messages = [_message(message, column, place) for message in value]
    if not messages:
        return b""
    try:
        text = json.dumps(messages, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise malformed(f"{spell(place)} holds what JSON can't under {column!r}: {exc}; leave it out.", place) from exc
    return _encoded(text, column, place)


def _message(message: Any, column: str, place: Place) -> dict[str, Any]:
    """Returns a message with its role and content first and its other keys in order.

    The content is text, a list of parts such as `{"type": "text", "text": …}`, or null, which a message that calls
    tools may have: the model's template writes it. A role is text.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise malformed(f"{spell(place)} has a message under {column!r} without a string for `role`; add it.", place)
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    empty = content is None and ("content" in message or "tool_calls" in message)
    if not (isinstance(content, str) or parts or empty):
        raise malformed(
            f"{spell(place)} has a message under {column!r} without text or parts as its `content`; add it.", place
        )
    if parts:  # Parquet has a null for every key that a part lacks.
        content = [{key: value for key, value in part.items() if value is not None} for part in content or ()]
    others = {key: message[key] for key in sorted(message) if key not in ("role", "content")}
    named = {key: other for key, other in others.items() if other is not None}
    return {"role": message["role"], "content": content, **named}


def token_content(value: Any, column: str, place: Place) -> bytes:
    """Returns a list of token ids as little-endian int32."""
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        what = "list with other things than integers" if isinstance(value, list) else json_type(value)
        raise malformed(f"{spell(place)} holds a {what} under {column!r}; token ids are a list of integers.", place)
    return token_bytes(value, spell(place), **dict([place]))


def token_bytes(tokens: Sequence[int], where: str, **metadata: int) -> bytes:
    """Returns token ids as little-endian int32; raises CorpusMalformed unless they are non-negative int32."""
    if len(tokens) * 4 > MAX_DOCUMENT_BYTES:
        raise too_large(where, **metadata)
    if any(not 0 <= token < TOKEN_LIMIT for token in tokens):
        raise beyond_int32(where, **metadata)
    return np.array(tokens, dtype="<i4").tobytes()


def value_at(record: Mapping[str, Any], column: str, place: Place) -> Any:
    """Returns the value of a column; `a.b` is the field `b` of the column `a` unless a column has that whole name."""
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise missing_column(column, record, spell(place), **dict([place]))
        value = value[name]
    return value


def spell(place: Place) -> str:
    """Returns a place in words, as the beginning of a sentence."""
    kind, number = place
    return f"Line {number}" if kind == "line" else f"Row {number}, counted from 0,"


def malformed(message: str, place: Place | None = None, /, **metadata: object) -> CorpusMalformed:
    """Returns the error, with the place and `metadata` as its metadata."""
    figures = {**dict([place] if place else []), **metadata}
    return CorpusMalformed(message, metadata={name: str(value) for name, value in figures.items()})


def missing_column(column: str, available: Iterable[object], where: str, **metadata: object) -> CorpusMalformed:
    """Returns the error for a column that does not exist, with the names of the existing columns."""
    names = [str(name)[:100] for name in available]
    listed = ", ".join(names[:MAX_COLUMNS_NAMED]) or "none"
    if len(names) > MAX_COLUMNS_NAMED:
        listed += f" and {len(names) - MAX_COLUMNS_NAMED} more"
    return malformed(
        f"{where} has no column {column!r}; set spec.text_column to one of: {listed}.", columns=listed, **metadata
    )


def too_large(where: str, **metadata: object) -> CorpusMalformed:
    """Returns the error for a document beyond the limit."""
    return malformed(
        f"{where} is larger than {MAX_DOCUMENT_BYTES} bytes, the most a document may have; split it.",
        limit_bytes=MAX_DOCUMENT_BYTES,
        **metadata,
    )


def beyond_int32(where: str, **metadata: object) -> CorpusMalformed:
    """Returns the error for a token id out of range."""
    return malformed(f"{where} holds a token id that is negative or beyond int32.", **metadata)


def _encoded(text: str, column: str, place: Place) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as exc:  # JSON can spell half of a surrogate pair.
        raise malformed(
            f"{spell(place)} holds a lone surrogate in {column!r}, which is no character; repair the file.", place
        ) from exc
    if len(data) > MAX_DOCUMENT_BYTES:
        raise too_large(f"{spell(place)} has under {column!r} what", **dict([place]))
    return data


def json_type(value: object) -> str:
    """Returns JSON's name for the type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
