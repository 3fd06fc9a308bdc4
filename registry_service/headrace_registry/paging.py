"""Keyset pages: a token carries the key of the last row returned and a digest of the arguments it belongs to.

It carries the number of entries on all pages too: counting costs more than a page, so a listing is counted once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import clean_text

T = TypeVar("T")

MAX_PAGE_SIZE = 1000
# Half of the largest message that a client of gRPC takes unless told otherwise; sizes of rows are rough.
_MAX_PAGE_BYTES = 2 * 1024 * 1024
# Longer than any token made here; a caller's token is cut before it is decoded.
_MAX_TOKEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page to read: `size` rows behind the key `after` (None: from the start).

    `total` are the entries on all pages, as they were counted for the first one.
    """

    size: int
    after: tuple[str, ...] | None
    binding: str
    total: int | None = None

    def time_after(self) -> datetime | None:
        """Returns the key's first part as a time. Raises FieldInvalid if it is not a time."""
        if self.after is None:
            return None
        try:
            return datetime.fromisoformat(self.after[0])
        except ValueError as exc:
            raise _foreign_token() from exc

    def cut(
        self, found: list[T], key: Callable[[T], Sequence[str]], size_bytes: Callable[[T], int] = lambda _: 0
    ) -> tuple[list[T], str]:
        """Returns the rows of this page, and the token of the next page, empty on the last one.

        `found` are up to `size + 1` rows in order: a row beyond the page shows that there is a next one. By the rough
        `size_bytes` of rows that may be large, a page ends early, with one row at least.
        """
        rows, n_bytes = found[: self.size], 0
        for place, row in enumerate(rows):
            n_bytes += size_bytes(row)
            if n_bytes > _MAX_PAGE_BYTES and place:
                rows = rows[:place]
                break
        return rows, self.token_after(key(rows[-1])) if len(found) > len(rows) else ""

    def token_after(self, key: Sequence[str]) -> str:
        """Returns the token of the page behind `key`."""
        return _encoded([self.binding, self.total, *key])

    async def counted(self, rows: Sequence[object], token: str, count: Callable[[], Awaitable[int]]) -> tuple[str, int]:
        """Returns the token of the next page and the number of entries on all pages, for a page's rows and token."""
        if self.total is not None:
            return token, self.total
        if not token and self.after is None:
            return token, len(rows)
        total = await count()
        if token:
            binding, _, *key = _decoded(token)
            token = _encoded([binding, total, *key])
        return token, total


def page_from(*, size: int, token: str, bound_to: Sequence[str], default: int, key_length: int) -> Page:
    """Checks size and token, and returns the page to read. The token must come from a call with the same `bound_to`."""
    if size < 0:
        raise FieldInvalid("page_size", "must not be negative; 0 means the default")
    binding = hashlib.sha256(json.dumps(list(bound_to)).encode()).hexdigest()[:16]
    after, total = _contents(token, binding, key_length) if token else (None, None)
    return Page(size=min(size or default, MAX_PAGE_SIZE), after=after, binding=binding, total=total)


def _contents(token: str, binding: str, key_length: int) -> tuple[tuple[str, ...], int | None]:
    """Returns a token's key, and the number of entries on all pages if it was counted."""
    try:
        bound, total, *key = _decoded(token)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise _foreign_token() from None
    is_total = total is None or (type(total) is int and 0 <= total < 1 << 63)
    if not is_total or len(key) != key_length or not all(map(_is_key, key)):
        raise _foreign_token()
    if bound != binding:
        raise FieldInvalid("page_token", "belongs to other arguments; repeat the call with the filter it came from")
    return tuple(key), total


def _is_key(part: object) -> bool:
    return isinstance(part, str) and part == clean_text(part, len(part))


def _encoded(parts: Sequence[object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def _decoded(token: str) -> list[Any]:
    text = token[:_MAX_TOKEN].encode("ascii")
    parts = json.loads(base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True))
    if not isinstance(parts, list):
        raise TypeError("a token is a list")
    return parts


def _foreign_token() -> FieldInvalid:
    return FieldInvalid("page_token", "not a token of this service; start again with an empty one")
