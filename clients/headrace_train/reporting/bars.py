"""Progress on a terminal, drawn with rich."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from headrace_train.reporting.progress import Throttle, Tick
from headrace_train.reporting.reporters import describe, print_lines


class BarReporter:
    """A bar for each phase, within 80 columns; drawn only when a method is called, without a thread of its own."""

    def __init__(self, out: IO[str], *, every_s: float = 0.2) -> None:
        self._out = out
        self._throttle = Throttle(every_s)
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            console=Console(file=out),
            auto_refresh=False,
        )
        self._tasks: dict[str, TaskID] = {}

    def note(self, text: str, **facts: Any) -> None:
        """Writes the text above the bars."""
        del facts
        self._bars.console.print(escape(text), highlight=False)

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Redraws the bar of the phase five times a second, and for its last tick."""
        if not (self._throttle.due() or last):
            return
        if tick.phase not in self._tasks:
            self._tasks[tick.phase] = self._bars.add_task(tick.phase, text="")
        task = self._tasks[tick.phase]
        self._bars.update(
            task, total=tick.total or None, completed=tick.done, text=escape(describe(tick, between="\n")), refresh=True
        )

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Ends the bars, and writes one line for each of `lines`."""
        del facts
        self._bars.stop()
        print_lines(self._out, lines)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()
