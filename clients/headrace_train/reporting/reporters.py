"""Progress for people at a terminal, for people reading a log, and for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from headrace_train.exits import say
from headrace_train.reporting.progress import Reporter, Throttle, Tick

_LABELS = {
    "loss": "loss",
    "l0": "L0",
    "explained_variance": "explained",
    "batch_explained_variance": "explained (batch)",
}


def new_reporter(out: IO[str], *, as_json: bool) -> Reporter:
    """Chooses by what `out` is."""
    if as_json:
        return JsonReporter(out)
    return BarReporter(out) if out.isatty() else LineReporter(out)


class JsonReporter:
    """One JSON object a line, with `event`: note, progress or result."""

    def __init__(self, out: IO[str], *, every_s: float = 0.5) -> None:
        self._out = out
        self._throttle = Throttle(every_s)

    def note(self, text: str, **facts: Any) -> None:
        """Writes it."""
        self._write("note", {"message": text, **facts})

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Writes it when it is time."""
        if not (self._throttle.due() or last):
            return
        facts = {
            "phase": tick.phase,
            "done": tick.done,
            "total": tick.total,
            "percent": tick.percent,
            "rows_per_s": tick.rows_per_s,
            "eta_s": tick.eta_s,
            "wait": tick.wait,
            "doing": tick.doing,
            **tick.figures,
        }
        self._write("progress", {name: _rounded(value) for name, value in facts.items()})

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Writes them."""
        del lines
        self._write("result", facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def _write(self, event: str, facts: Mapping[str, Any]) -> None:
        say(self._out, json.dumps({"event": event, **facts}, allow_nan=False))


class LineReporter:
    """Plain lines, one every few seconds."""

    def __init__(self, out: IO[str], *, every_s: float = 3.0) -> None:
        self._out = out
        self._throttle = Throttle(every_s)
        self._phase = ""

    def note(self, text: str, **facts: Any) -> None:
        """Writes it."""
        del facts
        say(self._out, text)

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Writes it when it is time."""
        begins = tick.phase != self._phase
        self._phase = tick.phase
        if self._throttle.due() or last or begins:
            percent = "" if tick.percent is None else f"{tick.percent:3.0f}%  "
            say(self._out, f"{tick.phase:<10} {percent}{describe(tick)}")

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Writes them."""
        del facts
        _print_lines(self._out, lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        return None


class BarReporter:
    """A live bar for each phase, within 80 columns; drawn only when something is told, by no thread of its own."""

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
        """Writes it."""
        del facts
        self._bars.console.print(escape(text), highlight=False)

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Writes it when it is time."""
        if not (self._throttle.due() or last):
            return
        if tick.phase not in self._tasks:
            self._tasks[tick.phase] = self._bars.add_task(tick.phase, text="")
        task = self._tasks[tick.phase]
        self._bars.update(
            task, total=tick.total or None, completed=tick.done, text=escape(describe(tick, between="\n")), refresh=True
        )

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Writes them."""
        del facts
        self._bars.stop()
        _print_lines(self._out, lines)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()


def describe(tick: Tick, *, between: str = "  ") -> str:
    """Rows and rates, then figures, with `between` in between."""
    pace = [f"{tick.done:,}/{tick.total:,} rows" if tick.total else f"{tick.done:,} rows"]
    pace += [f"{tick.rows_per_s:,.0f} rows/s"] if tick.rows_per_s else []
    pace += [f"ETA {duration(tick.eta_s)}"] if tick.eta_s else []
    figures = [f"{_LABELS.get(name, name)} {_figure(value)}" for name, value in tick.figures.items()]
    figures += [f"waits {100 * tick.wait:.0f}%"] if tick.wait is not None else []
    figures += [tick.doing] if tick.doing else []
    return between.join("  ".join(parts) for parts in (pace, figures) if parts)


def duration(seconds: float) -> str:
    """Minutes and seconds, as 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _print_lines(out: IO[str], lines: Mapping[str, str]) -> None:
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        say(out, f"{name:<{width}}  {text}")
