"""Pages of lists that are short enough to be counted: a page token is an offset."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message

from headrace_extractor.errors import FieldInvalid

MAX_PAGE_SIZE = 1000
# Half of the largest message that a client of gRPC takes unless told otherwise.
_MAX_PAGE_BYTES = 2 * 1024 * 1024

M = TypeVar("M", bound=Message)


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
        offset = int(base64.urlsafe_b64decode(token.encode())) if token else 0
    except (binascii.Error, ValueError):
        offset = -1
    if offset < 0:
        raise FieldInvalid("page_token is none that ListExtractions gave out.", field="page_token")
    return offset


def of_a_page(entries: Iterable[M]) -> list[M]:
    """Returns the first entries, as many as a message may hold: one at least, if there is one."""
    page: list[M] = []
    n_bytes = 0
    for entry in entries:
        n_bytes += entry.ByteSize()
        if page and n_bytes > _MAX_PAGE_BYTES:
            break
        page.append(entry)
    return page
