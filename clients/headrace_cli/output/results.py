"""Results on standard output: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from headrace_cli.output.formats import plain
from headrace_cli.settings import Settings

_PIPE_WIDTH = 1000  # Columns of a table that goes into a pipe or a file: wide enough that no cell is folded.


def print_json(value: Any) -> None:
    """Prints one JSON document on one line."""
    typer.echo(json.dumps(plain(value)))


def print_rows(
    settings: Settings, values: Iterable[Any], headings: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str
) -> None:
    """Prints a list: as a JSON array of `values`, as a table of `rows`, or as `empty` on standard error if none."""
    if settings.json:
        print_json(list(values))
        return
    kept = list(rows)
    if not kept:
        note(empty)
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in kept:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def print_value(settings: Settings, value: Any, facts: Mapping[str, str]) -> None:
    """Prints one thing: as a JSON object of `value`, or as one line for each of `facts` that is not empty."""
    if settings.json:
        print_json(value)
        return
    width = max((len(name) for name in facts), default=0)
    for name, text in facts.items():
        if text:
            typer.echo(f"{name:<{width}}  {text}")


def print_done(settings: Settings, value: Any, text: str) -> None:
    """Tells that something is done: as a JSON object of `value`, or as `text` on standard error."""
    if settings.json:
        print_json(value)
    else:
        note(text)


def note(text: str) -> None:
    """Prints a line on standard error."""
    typer.echo(text, err=True)
