"""Errors of the activation log as errors of this service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headrace_extractor.errors import DigestMismatch, DiskFull, TooManyStreams
from headrace_log import errors as log_errors


@contextmanager
def log_errors_as_typed() -> Iterator[None]:
    """Turns the log's errors into DiskFull, TooManyStreams and DigestMismatch."""
    try:
        yield
    except log_errors.DiskFull as exc:
        metadata = {"required_bytes": str(exc.required_bytes), "free_bytes": str(exc.free_bytes)}
        raise DiskFull(f"{exc}, and ask again.", metadata=metadata) from exc
    except log_errors.TooManyFiles as exc:
        raise too_many_streams(exc) from exc
    except (log_errors.SetCorrupt, log_errors.DigestMismatch) as exc:
        raise DigestMismatch(f"{exc}.") from exc


def too_many_streams(exc: log_errors.TooManyFiles) -> TooManyStreams:
    """The error for a server that can open no more files: its readers hold most of them."""
    return TooManyStreams(f"{exc}.", metadata={"max_files": str(exc.max_files)}, retry_after_s=5.0)
