"""Results of a benchmark: figures, their table on the terminal, their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A ratio `a / b` of the medians of two sides; `sense` says on which side of a `target` it should lie."""

    name: str
    ratio: float
    target: float | None
    sense: str  # `min` or `max`
    unit: str  # of `a` and `b`
    a: float
    b: float

    @property
    def met(self) -> bool:
        """True if the figure reaches its target or has none."""
        if self.target is None:
            return True
        return self.ratio >= self.target if self.sense == "min" else self.ratio <= self.target


def compare(
    name: str,
    a: Sequence[float],
    b: Sequence[float],
    *,
    unit: str,
    target: float | None = None,
    sense: str = "min",
) -> Figure:
    """Compares the medians of two series that were measured in turns."""
    return Figure(
        name=name, ratio=median(a) / median(b), target=target, sense=sense, unit=unit, a=median(a), b=median(b)
    )


def save(figures: Sequence[Figure], path: Path) -> None:
    """Writes the figures as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")


def show(figures: Sequence[Figure], console: Console) -> None:
    """Prints a table with one row per figure; a missed target is red."""
    table = Table(title="medians of this run", box=SIMPLE_HEAD)
    table.add_column("benchmark", no_wrap=True)
    for heading in ("headrace", "other", "unit", "ratio", "target"):
        table.add_column(heading, justify="left" if heading == "unit" else "right", no_wrap=True)
    table.add_column("")
    for figure in figures:
        verdict = "[green]met[/green]" if figure.met else "[bold red]missed[/bold red]"
        if figure.target is None:
            table.add_row(figure.name, _number(figure.a), _number(figure.b), figure.unit, f"{figure.ratio:.2f}", "", "")
            continue
        ratio = f"{figure.ratio:.2f}" if figure.met else f"[bold red]{figure.ratio:.2f}[/bold red]"
        target = f"{'≥' if figure.sense == 'min' else '≤'} {figure.target:g}"
        table.add_row(figure.name, _number(figure.a), _number(figure.b), figure.unit, ratio, target, verdict)
    console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
