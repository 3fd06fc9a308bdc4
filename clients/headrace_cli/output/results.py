"""Results on standard output: tables for people, JSON for machines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from headrace_cli.output.formats import plain
from headrace_cli.output.tables import Column, layout, table_of, terminal_width
from headrace_cli.settings import Settings


def print_json(value: Any) -> None:
    """Prints one JSON document on one line."""
    typer.echo(json.dumps(plain(value)))


def print_rows(
    settings: Settings, values: Iterable[Any], columns: Sequence[Column], rows: Iterable[Sequence[str]], *, empty: str
) -> None:
    """Prints a list: as a JSON array of `values`, as a table of `rows`, or as `empty` on standard error if none.

    Where the terminal is too narrow for a column, it is left out, and a note on standard error names it.
    """
    if settings.json:
        print_json(list(values))
        return
    kept = list(rows)
    if not kept:
        note(empty)
        return
    from rich.console import Console  # noqa: PLC0415

    width = None if settings.wide else terminal_width()
    shown = layout(columns, kept, width)
    console = Console(width=shown.width)
    with console.capture() as capture:  # rich would end the process by itself where the reader is gone.
        console.print(table_of(columns, kept, shown))
    typer.echo(capture.get(), nl=False)
    if shown.left_out and width is not None:
        note(textwrap.fill(f"--wide shows {', '.join(shown.left_out)} too", width))


def print_value(settings: Settings, value: Any, facts: Mapping[str, str]) -> None:
    """Prints one thing: as a JSON object of `value`, or as one line for each of `facts` that is not empty."""
    if settings.json:
        print_json(value)
        return
    shown = {name: text for name, text in facts.items() if text}
    indent = max((len(name) for name in shown), default=0) + 2
    for name, text in shown.items():
        print_wrapped(f"{name:<{indent}}", text)


def print_wrapped(beginning: str, text: str) -> None:
    """Prints a text behind its beginning; on a terminal it is wrapped between words, and further lines are indented.

    An id or a path that is longer than a line stays whole.
    """
    lines, width = [text], terminal_width()
    if width is not None:
        room = max(width - len(beginning), 1)
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [text]
    typer.echo(f"{beginning}{lines[0]}")
    for line in lines[1:]:
        typer.echo(f"{'':<{len(beginning)}}{line}")


def print_done(settings: Settings, value: Any, text: str) -> None:
    """Tells that something is done: as a JSON object of `value`, or as `text` on standard error."""
    if settings.json:
        print_json(value)
    else:
        note(text)


def note(text: str) -> None:
    """Prints a line on standard error."""
    typer.echo(text, err=True)
