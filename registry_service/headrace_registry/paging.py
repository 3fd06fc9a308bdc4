"""Keyset pages: a token carries the last key seen and a digest of the arguments it belongs to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from headrace_registry.errors import FieldInvalid

MAX_PAGE_SIZE = 1000
_MAX_TOKEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What to read: `size` rows behind the key `after` (None: from the start)."""

    size: int
    after: tuple[str, ...] | None
    binding: str

    def time_after(self) -> datetime | None:
        """Returns the key's first part as a time. Raises FieldInvalid if it is none."""
        if self.after is None:
            return None
        try:
            return datetime.fromisoformat(self.after[0])
        except ValueError as exc:
            raise _foreign_token() from exc

    def token_after(self, key: Sequence[str]) -> str:
        """Returns the token that continues behind `key`."""
        raw = json.dumps([self.binding, *key]).encode()
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def page_from(*, size: int, token: str, bound_to: Sequence[str], default: int, key_length: int) -> Page:
    """Checks size and token. The token must come from a call with the same `bound_to`."""
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
