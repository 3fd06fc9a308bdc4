"""Errors of the activation log as errors of this service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headrace_extractor.errors import DigestMismatch, DiskFull, StateConflict, TooManyStreams, WaitTimeout
from headrace_log import errors as log_errors


@contextmanager
def log_errors_as_typed() -> Iterator[None]:
    """Turns the log's errors into DiskFull, TooManyStreams, DigestMismatch, WaitTimeout and StateConflict."""
    try:
        yield
    except log_errors.DiskFull as exc:
        metadata = {"required_bytes": str(exc.required_bytes), "free_bytes": str(exc.free_bytes)}
        raise DiskFull(f"{exc}, and ask again.", metadata=metadata) from exc
    except log_errors.TooManyFiles as exc:
        raise too_many_streams(exc) from exc
    except log_errors.DigestMismatch as exc:
        raise damaged(exc) from exc
    except log_errors.SetCorrupt as exc:
        raise DigestMismatch(f"{exc}.") from exc
    except log_errors.LockHeld as exc:
        raise WaitTimeout(f"{exc}.", retry_after_s=5.0) from exc
    except log_errors.NoLocks as exc:
        raise StateConflict(f"{exc}.") from exc


def damaged(exc: log_errors.DigestMismatch) -> DigestMismatch:
    """The error that names the file and the rows that are damaged."""
    metadata = {
        "file": str(exc.path),
        "column": exc.column,
        "first_row": str(exc.first_row),
        "end_row": str(exc.first_row + exc.n_rows),
    }
    return DigestMismatch(f"{exc}.", metadata=metadata)


def too_many_streams(exc: log_errors.TooManyFiles) -> TooManyStreams:
    """The error for a server that can open no more files: its readers hold most of them."""
    return TooManyStreams(f"{exc}.", metadata={"max_files": str(exc.max_files)}, retry_after_s=5.0)
