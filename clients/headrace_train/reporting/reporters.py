"""Progress and results as plain lines or as JSON lines. `bars.py` draws them on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self

from headrace_train.exits import say
from headrace_train.reporting.progress import Reporter, Throttle, Tick

_LABELS = {
    "loss": "loss",
    "l0": "L0",
    "explained_variance": "explained",
    "batch_explained_variance": "explained (batch)",
}


def new_reporter(out: IO[str], *, as_json: bool) -> Reporter:
    """Returns a reporter that writes to `out`: JSON lines, bars on a terminal, plain lines otherwise."""
    if as_json:
        return JsonReporter(out)
    if out.isatty():
        with suppress(ModuleNotFoundError):  # rich comes with the extra `cli`: plain lines do without it.
            from headrace_train.reporting.bars import BarReporter  # noqa: PLC0415

            return BarReporter(out)
    return LineReporter(out)


class JsonReporter:
    """One JSON object a line, with `event`: note, progress or result."""

    def __init__(self, out: IO[str], *, every_s: float = 0.5) -> None:
        self._out = out
        self._throttle = Throttle(every_s)

    def note(self, text: str, **facts: Any) -> None:
        """Writes the text as an event, with its facts."""
        self._write("note", {"message": text, **facts})

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Writes an event twice a second, and for the last tick of a phase."""
        if not (self._throttle.due() or last):
            return
        facts: dict[str, Any] = {
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
        for name, value in facts.items():
            if isinstance(value, float):  # JSON has no NaN and no infinity; six digits are enough for a figure.
                facts[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        self._write("progress", facts)

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Writes the facts as an event."""
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
        """Writes the text."""
        del facts
        say(self._out, text)

    def tick(self, tick: Tick, *, last: bool = False) -> None:
        """Writes a line every few seconds, and for the first and last tick of a phase."""
        begins = tick.phase != self._phase
        self._phase = tick.phase
        if self._throttle.due() or last or begins:
            percent = "" if tick.percent is None else f"{tick.percent:3.0f}%  "
            say(self._out, f"{tick.phase:<10} {percent}{describe(tick)}")

    def finished(self, lines: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Writes one line for each of `lines`."""
        del facts
        print_lines(self._out, lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        return None


def describe(tick: Tick, *, between: str = "  ") -> str:
    """Describes a tick: rows and rates, then figures, separated by `between`."""
    pace = [f"{tick.done:,}/{tick.total:,} rows" if tick.total else f"{tick.done:,} rows"]
    pace += [f"{tick.rows_per_s:,.0f} rows/s"] if tick.rows_per_s else []
    pace += [f"ETA {duration(tick.eta_s)}"] if tick.eta_s else []
    figures = [
        f"{_LABELS.get(name, name)} {value:.3f}" if abs(value) < 10 else f"{_LABELS.get(name, name)} {value:,.1f}"
        for name, value in tick.figures.items()
    ]
    figures += [f"waits {100 * tick.wait:.0f}%"] if tick.wait is not None else []
    figures += [tick.doing] if tick.doing else []
    return between.join("  ".join(parts) for parts in (pace, figures) if parts)


def duration(seconds: float) -> str:
    """Minutes and seconds, as 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def print_lines(out: IO[str], lines: Mapping[str, str]) -> None:
    """Writes one line for each item: the name, padded to the longest one, and the text."""
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        say(out, f"{name:<{width}}  {text}")
