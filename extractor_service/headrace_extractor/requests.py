"""Calls that were carried out, by request id: one repeated because its answer was lost is not carried out again."""

from __future__ import annotations

import re
import threading

from headrace_extractor.errors import FieldInvalid

# Clients repeat a call within seconds, so the latest are enough, and this process's.
MAX_REMEMBERED = 10_000
_UUID4 = re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")


def checked_request_id(request_id: str) -> str:
    """Returns what a client sent, which may be empty."""
    if request_id and not _UUID4.match(request_id):
        raise FieldInvalid("request_id is no UUID4; send one per intended call.", field="request_id")
    return request_id


class Requests:
    """What the latest calls of one method were about; may be used from several threads."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._ids: dict[str, str] = {}

    def remember(self, request_id: str, resource_id: str) -> None:
        """Notes that a call was carried out; without a request id it can't be repeated."""
        if not request_id:
            return
        with self._lock:
            self._ids[request_id] = resource_id
            if len(self._ids) > self._limit:
                del self._ids[next(iter(self._ids))]

    def recall(self, request_id: str) -> str | None:
        """Returns what the call was about if it was carried out."""
        with self._lock:
            return self._ids.get(request_id)
