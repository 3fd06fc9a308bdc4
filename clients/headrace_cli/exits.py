"""Exit codes, and the printing of errors as text or as JSON.

0 done · 1 failed · 2 usage · 3 not found · 4 unavailable or out of time · 5 refused: permission, state or capacity ·
130 interrupted, by Ctrl-C or SIGTERM · 141 (SIGPIPE) the reader of the output is gone
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import typer

from headrace_cli.settings import Settings

if TYPE_CHECKING:
    from headrace_client import HeadraceError

FAILED, USAGE, NOT_FOUND, UNAVAILABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 5, 130
INTERRUPT_GRACE_S = 10.0  # Time to close streams and sync files before the process is ended by force.

_P = ParamSpec("_P")
_R = TypeVar("_R")


def end_when_interrupted() -> None:
    """Makes Ctrl-C and SIGTERM end the process within `INTERRUPT_GRACE_S`, even if cleaning up hangs."""

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        timer = threading.Timer(INTERRUPT_GRACE_S, os._exit, (INTERRUPTED,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


@contextlib.contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Ends the process without a word if nobody reads its output any more, as in `headrace models list | head -1`.

    Python ignores SIGPIPE, so that a lost connection is an error and not an end: here the process ends by it in the way
    of other programs.
    """
    try:
        yield
    except BrokenPipeError:
        _end_by_sigpipe()
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # A process may be started without them.
                    stream.flush()
        except BrokenPipeError:
            _end_by_sigpipe()


def _end_by_sigpipe() -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.raise_signal(signal.SIGPIPE)
    os._exit(FAILED)  # Only where the signal is blocked.


def reported(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wraps a command whose first argument is its typer.Context: an error becomes a message and an exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        context: Any = kwargs.get("context") or args[0]
        settings = context.find_object(Settings) or Settings()
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _end_by_sigpipe()
        except Exception as exc:
            # typer prints its own exceptions (typer.Exit, usage errors): they carry an exit code.
            if hasattr(exc, "exit_code"):
                raise
            raise typer.Exit(report(exc, settings)) from exc

    return run


def report(exc: Exception, settings: Settings) -> int:
    """Prints an error to standard error; returns the exit code."""
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    if isinstance(exc, HeadraceError):
        error = exc
    elif isinstance(exc, OSError):
        remedy = "check the path, its permissions and the free space"
        error = HeadraceError(str(exc), reason="FILE_ERROR", remedy=remedy)
    else:
        remedy = "run it again with --debug, and report what it prints"
        error = HeadraceError(f"{type(exc).__name__}: {exc}", reason="BUG", remedy=remedy)
    code = exit_code(error)
    if settings.debug:
        traceback.print_exception(exc)
    if settings.json:
        facts = {
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "fields": error.fields,
            "retry_after_s": error.retry_after_s,
            "remedy": error.remedy,
            "request_id": error.request_id,
            "exit_code": code,
        }
        typer.echo(json.dumps({"error": facts}), err=True)
        return code

    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((error.reason, "bold red"), (f": {error.message}", "red")))
    for name, why in error.fields.items():
        # A long description is sent with a gap in its middle.
        if why and not all(part in error.message for part in why.split(" … ")):
            console.print(Text(f"  {name}: {why}", style="red"))
    if error.remedy:
        console.print(Text(f"  what to do: {error.remedy}", style="red"))
    if error.request_id:
        console.print(Text(f"  request: {error.request_id}", style="dim"))
    return code


def exit_code(error: HeadraceError) -> int:
    """Returns the exit code of an error."""
    from headrace_client import errors  # noqa: PLC0415

    if isinstance(error, errors.NotFound):
        return NOT_FOUND
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded):
        return UNAVAILABLE
    refusals = errors.PermissionDenied | errors.Unauthenticated | errors.FailedPrecondition | errors.ResourceExhausted
    if isinstance(error, refusals):
        return REFUSED
    # Not its subclasses: a corpus that can't be parsed is a failure, not a wrong use of the command.
    return USAGE if type(error) is errors.InvalidArgument else FAILED
