"""The base of every error that crosses a service boundary: plain data, no gRPC.

    ServiceError
    ├── FieldInvalid, AlreadyExists, StateConflict, NotImplementedYet, …   (registry_service.errors, extractor_service.errors)

A subclass names the situation; a table in the service's `rpc/status.py` gives it a canonical code and a reason. What has
no row in the table is a bug and leaves as INTERNAL.
"""

from __future__ import annotations

from collections.abc import Mapping


class ServiceError(Exception):
    """An expected failure.

    `message` is one sentence that names the remedy; everything dynamic in it is in `metadata` too. `retry_after_s` says
    when trying again may help; `field` names the request field at fault; `resource` is (type, name).
    """

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field: str | None = None,
        resource: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.field = field
        self.resource = resource
