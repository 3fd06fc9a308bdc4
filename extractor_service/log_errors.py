"""Errors of the activation log as errors of this service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from activation_log import errors as log_errors
from extractor_service.errors import DigestMismatch, DiskFull


@contextmanager
def log_errors_as_typed() -> Iterator[None]:
    """Turns what the log raises into DiskFull and DigestMismatch."""
    try:
        yield
    except log_errors.DiskFull as exc:
        metadata = {"required_bytes": str(exc.required_bytes), "free_bytes": str(exc.free_bytes)}
        raise DiskFull(f"{exc}, and ask again.", metadata=metadata) from exc
    except (log_errors.SetCorrupt, log_errors.DigestMismatch) as exc:
        raise DigestMismatch(f"{exc}.") from exc
