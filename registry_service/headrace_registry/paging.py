"""Keyset pages: a token carries the key of the last row returned and a digest of the arguments it belongs to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from headrace_registry.errors import FieldInvalid

T = TypeVar("T")

MAX_PAGE_SIZE = 1000
# Longer than any token made here; a caller's token is cut before it is decoded.
_MAX_TOKEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page to read: `size` rows behind the key `after` (None: from the start)."""

    size: int
    after: tuple[str, ...] | None
    binding: str

    def time_after(self) -> datetime | None:
        """Returns the key's first part as a time. Raises FieldInvalid if it is not a time."""
        if self.after is None:
            return None
        try:
            return datetime.fromisoformat(self.after[0])
        except ValueError as exc:
            raise _foreign_token() from exc

    def cut(self, found: list[T], key: Callable[[T], Sequence[str]]) -> tuple[list[T], str]:
        """Returns the rows of this page, and the token of the next page, empty on the last one.

        `found` are up to `size + 1` rows in order: a row beyond the page shows that there is a next one.
        """
        rows = found[: self.size]
        return rows, self.token_after(key(rows[-1])) if len(found) > self.size else ""

    def token_after(self, key: Sequence[str]) -> str:
        """Returns the token of the page behind `key`."""
        raw = json.dumps([self.binding, *key]).encode()
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def page_from(*, size: int, token: str, bound_to: Sequence[str], default: int, key_length: int) -> Page:
    """Checks size and token, and returns the page to read. The token must come from a call with the same `bound_to`."""
    if size < 0:
        raise FieldInvalid("page_size", "must not be negative; 0 means the default")
    binding = hashlib.sha256(json.dumps(list(bound_to)).encode()).hexdigest()[:16]
    after = _key_of(token, binding, key_length) if token else None
    return Page(size=min(size or default, MAX_PAGE_SIZE), after=after, binding=binding)


def _key_of(token: str, binding: str, key_length: int) -> tuple[str, ...]:
    try:
        raw = base64.b64decode(
            token[:_MAX_TOKEN].encode("ascii") + b"=" * (-len(token[:_MAX_TOKEN]) % 4), altchars=b"-_", validate=True
        )
        bound, *key = json.loads(raw)
    except (ValueError, TypeError, binascii.Error):
        bound, key = "", []
    if len(key) != key_length or not all(isinstance(part, str) and "\x00" not in part for part in key):
        raise _foreign_token()
    if bound != binding:
        raise FieldInvalid("page_token", "belongs to other arguments; repeat the call with the filter it came from")
    return tuple(key)


def _foreign_token() -> FieldInvalid:
    return FieldInvalid("page_token", "not a token of this service; start again with an empty one")
