"""Pages of lists that are short enough to be counted: a page token is an offset."""

from __future__ import annotations

import base64
import binascii

from headrace_extractor.errors import FieldInvalid

MAX_PAGE_SIZE = 1000


def page_size(asked: int) -> int:
    """Entries of a page. Raises FieldInvalid."""
    if asked < 0:
        raise FieldInvalid("page_size is negative; 0 means 100.", field="page_size")
    return min(asked or 100, MAX_PAGE_SIZE)


def token_for(offset: int) -> str:
    """The token of the page that begins at `offset`."""
    return base64.urlsafe_b64encode(str(offset).encode()).decode()


def offset_of(token: str) -> int:
    """Inverse of `token_for`; 0 for an empty token. Raises FieldInvalid."""
    try:
        return int(base64.urlsafe_b64decode(token.encode())) if token else 0
    except (binascii.Error, ValueError) as exc:
        raise FieldInvalid("page_token is none that ListExtractions gave out.", field="page_token") from exc
