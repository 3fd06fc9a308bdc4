"""The end of a server that can't start: one sentence for a person at a terminal, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from headrace_chassis.errors import StartError

START_FAILED = 2


def exit_status(name: str, run: Callable[[], None]) -> int:
    """Runs a server until it ends; returns 0, or START_FAILED after a StartError, whose sentence it prints.

    A TaskGroup wraps such an error in a group, together with what its other tasks ended with: the first one is told.
    """
    found: list[BaseException] = []
    try:
        run()
    except* StartError as group:
        found.append(group)
    while found and isinstance(found[-1], BaseExceptionGroup):
        found.append(found[-1].exceptions[0])
    if found:
        sys.stderr.write(f"{name}: {found[-1]}\n")
    return START_FAILED if found else 0
