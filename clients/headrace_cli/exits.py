"""Exit codes, and errors as people and machines read them.

0 done · 1 failed · 2 usage · 3 not found · 4 unavailable or out of time · 5 refused: permission, state or capacity ·
130 interrupted, by Ctrl-C or SIGTERM
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from headrace_cli.settings import Settings

if TYPE_CHECKING:
    from headrace_client import HeadraceError

FAILED, USAGE, NOT_FOUND, UNAVAILABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 5, 130
INTERRUPT_GRACE_S = 10.0

_P = ParamSpec("_P")
_R = TypeVar("_R")


def end_when_interrupted() -> None:
    """Has Ctrl-C and SIGTERM end the process within `INTERRUPT_GRACE_S`, even where cleaning up hangs."""

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        timer = threading.Timer(INTERRUPT_GRACE_S, os._exit, (INTERRUPTED,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def reported(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wraps a command whose first argument is its typer.Context: errors become a message and an exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        context: Any = kwargs.get("context") or args[0]
        settings = context.find_object(Settings) or Settings()
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as exc:
            # typer.Exit and usage errors are RuntimeErrors and exceptions of its own, with an exit code.
            if hasattr(exc, "exit_code"):
                raise
            raise typer.Exit(report(exc, settings)) from exc

    return run


def report(exc: Exception, settings: Settings) -> int:
    """Prints an error to standard error; returns the exit code."""
    error = _as_headrace_error(exc)
    if settings.debug:
        traceback.print_exception(exc)
    if settings.json:
        typer.echo(json.dumps({"error": _facts(error)}), err=True)
    else:
        _print(error)
    return exit_code(error)


def exit_code(error: HeadraceError) -> int:
    """The exit code of an error."""
    from headrace_client import errors  # noqa: PLC0415

    if isinstance(error, errors.NotFound):
        return NOT_FOUND
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded):
        return UNAVAILABLE
    refusals = errors.PermissionDenied | errors.Unauthenticated | errors.FailedPrecondition | errors.ResourceExhausted
    if isinstance(error, refusals):
        return REFUSED
    return USAGE if type(error) is errors.InvalidArgument else FAILED


def _as_headrace_error(exc: Exception) -> HeadraceError:
    from headrace_client.errors import HeadraceError  # noqa: PLC0415

    if isinstance(exc, HeadraceError):
        return exc
    if isinstance(exc, OSError):
        return HeadraceError(str(exc), reason="FILE_ERROR", remedy="check the path, its permissions and the free space")
    return HeadraceError(
        f"{type(exc).__name__}: {exc}", reason="BUG", remedy="run it again with --debug, and report what it prints"
    )


def _facts(error: HeadraceError) -> dict[str, object]:
    return {
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "fields": error.fields,
        "retry_after_s": error.retry_after_s,
        "remedy": error.remedy,
        "exit_code": exit_code(error),
    }


def _print(error: HeadraceError) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((error.reason, "bold red"), (f": {error.message}", "red")))
    for name, why in error.fields.items():
        if why and why not in error.message:
            console.print(Text(f"  {name}: {why}", style="red"))
    if error.remedy:
        console.print(Text(f"  what to do: {error.remedy}", style="red"))
