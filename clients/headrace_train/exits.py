"""Exit codes, the same as those of the `headrace` command, and the printing of errors as text or as JSON.

0 done · 1 failed · 2 usage · 3 not found · 4 unavailable or out of time · 5 refused: permission, state or capacity ·
130 interrupted · 141 (SIGPIPE) the reader of the output is gone
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from typing import IO, Any, NoReturn

from headrace_client import errors
from headrace_client.errors import HeadraceError

DONE, FAILED, USAGE, NOT_FOUND, UNAVAILABLE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_REFUSALS = (
    errors.PermissionDenied,
    errors.Unauthenticated,
    errors.FailedPrecondition,
    errors.ResourceExhausted,
)


def end_by_sigpipe() -> NoReturn:
    """Ends the process without a word, in the way of other programs whose output nobody reads any more."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.raise_signal(signal.SIGPIPE)
    os._exit(FAILED)  # Only where the signal is blocked.


def say(stream: IO[str], line: str) -> None:
    """Writes a line and flushes it."""
    stream.write(line + "\n")
    stream.flush()


def report(exc: Exception, err: IO[str], *, as_json: bool, debug: bool) -> int:
    """Prints an error to `err`; returns the exit code."""
    error = as_headrace_error(exc)
    code = exit_code(error)
    if debug:
        traceback.print_exception(exc, file=err)
    if as_json:
        facts: dict[str, Any] = {
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "fields": error.fields,
        }
        facts |= {"remedy": error.remedy, "request_id": error.request_id, "exit_code": code}
        say(err, json.dumps({"error": facts}))
        return code
    say(err, str(error))
    if error.remedy:
        say(err, f"  what to do: {error.remedy}")
    if error.request_id:
        say(err, f"  request: {error.request_id}")
    return code


def exit_code(error: HeadraceError) -> int:
    """Returns the exit code of an error."""
    if isinstance(error, errors.NotFound):
        return NOT_FOUND
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded):
        return UNAVAILABLE
    if isinstance(error, _REFUSALS):
        return REFUSED
    # Not its subclasses: a corpus that can't be parsed is a failure, not a wrong use of the command.
    return USAGE if type(error) is errors.InvalidArgument else FAILED


def as_headrace_error(exc: Exception) -> HeadraceError:
    """Makes any exception a typed error: a file that can't be used, memory that ran out, or else a bug."""
    if isinstance(exc, HeadraceError):
        return exc
    if isinstance(exc, OSError):
        return HeadraceError(str(exc), reason="FILE_ERROR", remedy="check the path, its permissions and the free space")
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":  # By name: torch may not be loaded.
        return errors.DeviceOutOfMemory(
            str(exc) or "out of memory", remedy="take a smaller --d-sae, --batch-size or --buffer-rows"
        )
    return HeadraceError(
        f"{type(exc).__name__}: {exc}", reason="BUG", remedy="run it again with --debug, and report what it prints"
    )
