"""Tables that never break an id or a name: columns that a terminal has no room for are left out, by their rank."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 2  # Blanks between two columns.
_PROSE_WIDTH = 24  # Prose in a narrower column is hard to read.
_LONGEST_WORD = 48  # Longer words, such as paths in messages, are broken rather than kept whole.


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. Where there is no room for all, those of the lowest `rank` come first; rank 0 always stays.

    Only cells of `prose` are wrapped, between words.
    """

    heading: str
    rank: int = 0
    prose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The columns that are shown, by number, with their widths, and the headings of those without room."""

    widths: dict[int, int]
    left_out: tuple[str, ...]

    @property
    def width(self) -> int:
        """Width of a line."""
        return _line_width(self.widths)


def facts_of(columns: Sequence[Column], row: Sequence[str]) -> dict[str, str]:
    """Returns a row's cells by their headings, to show one thing by itself."""
    return {column.heading: cell for column, cell in zip(columns, row, strict=True)}


def terminal_width() -> int | None:
    """Returns the columns of the terminal on standard output; None for a pipe or a file, which have no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def layout(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> Layout:
    """Chooses columns for a line of `width` characters; None shows all of them, each as wide as it needs.

    A line that is still too wide without all columns that may go stays so: the terminal wraps it, and what is copied
    from there is whole.
    """
    from rich.cells import cell_len  # noqa: PLC0415

    cells = [[column.heading, *(row[number] for row in rows)] for number, column in enumerate(columns)]
    natural = {number: max(map(cell_len, texts)) for number, texts in enumerate(cells)}
    if width is None:
        return Layout(widths=natural, left_out=())
    # A column that is empty in every row tells nothing here; a program that reads a pipe counts on it.
    widths = {number: natural[number] for number, column in enumerate(columns) if any(cells[number][1:])}
    for number in widths:
        if columns[number].prose:
            longest = max(cell_len(word) for text in cells[number] for word in text.split() or [""])
            widths[number] = min(natural[number], max(_PROSE_WIDTH, min(longest, _LONGEST_WORD)))
    # By rank, and in each rank from the left: a narrow column may still fit where a wide one of a better rank did not.
    shown: dict[int, int] = {}
    for number in sorted(widths, key=lambda number: columns[number].rank):
        if not columns[number].rank or _line_width({**shown, number: widths[number]}) <= width:
            shown[number] = widths[number]
    left_out = [number for number in widths if number not in shown]
    widths = {number: shown[number] for number in widths if number in shown}
    for number, narrow in list(widths.items()):
        if columns[number].prose:
            widths[number] = min(natural[number], narrow + max(0, width - _line_width(widths)))
    return Layout(widths=widths, left_out=tuple(columns[number].heading for number in left_out))


def table_of(columns: Sequence[Column], rows: Sequence[Sequence[str]], shown: Layout) -> Table:
    """Makes the table for rich to print, on a console of at least `shown.width` columns."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for number, width in shown.widths.items():
        table.add_column(columns[number].heading, width=width, no_wrap=not columns[number].prose, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[number]) for number in shown.widths))
    return table


def _line_width(widths: dict[int, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)
