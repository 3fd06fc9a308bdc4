"""Calls by request id: a call that a client repeats because its answer was lost is not carried out again."""

from __future__ import annotations

import re
import threading

from headrace_extractor.errors import FieldInvalid

# Clients repeat a call within seconds, so the latest ids are enough, and they need not survive a restart.
MAX_REMEMBERED = 10_000
_UUID4 = re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")


def checked_request_id(request_id: str) -> str:
    """Returns the request id, which may be empty; raises FieldInvalid if it is no UUID4."""
    if request_id and not _UUID4.match(request_id):
        raise FieldInvalid("request_id is no UUID4; send one per intended call.", field="request_id")
    return request_id


class Requests:
    """The resource ids of the latest calls of one method; may be used from several threads."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._ids: dict[str, str] = {}

    def remember(self, request_id: str, resource_id: str) -> None:
        """Notes that a call was carried out; a call without a request id can't be recognised when repeated."""
        if not request_id:
            return
        with self._lock:
            self._ids[request_id] = resource_id
            if len(self._ids) > self._limit:
                del self._ids[next(iter(self._ids))]

    def recall(self, request_id: str) -> str | None:
        """Returns the resource id of a call that was carried out; None for an unknown request id."""
        with self._lock:
            return self._ids.get(request_id)
