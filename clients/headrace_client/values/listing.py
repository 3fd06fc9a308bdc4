"""Lists and values as people read them: short in a terminal, tables in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from typing import Any, ClassVar, TypeVar

_T = TypeVar("_T")

_IN_A_LINE = 5  # Values that the repr of a list shows.
_IN_A_TABLE = 50  # Rows that a notebook shows.


class Shown:
    """A value whose repr names only the fields in `SHOWN`; a notebook shows all fields that are set."""

    __slots__ = ()
    SHOWN: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name in self.SHOWN)
        fields = [f"{name}={value if isinstance(value, int | float) else _text(value)!r}" for name, value in values]
        return f"{type(self).__name__}({', '.join(fields)}, …)"

    def _repr_html_(self) -> str:
        names = getattr(type(self), "__dataclass_fields__", {})
        cells = [(name, _text(getattr(self, name))) for name in names]
        return _table([], [[name, text] for name, text in cells if text not in ("", "0", "()", "{}")])


class Listing(list[_T]):
    """A list, as `client.*.list()` returns it. Its repr shows the first values; a notebook shows a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        first = [repr(one) for one in self[:_IN_A_LINE]]
        more = [f"… {len(self) - _IN_A_LINE} more"] if len(self) > _IN_A_LINE else []
        return f"[{', '.join([*first, *more])}]"

    def _repr_html_(self) -> str:
        names: Sequence[str] = getattr(self[0], "SHOWN", ()) if self else ()
        if not names:
            return f"<code>{html.escape(repr(self))}</code>"
        more = [f"… {len(self) - _IN_A_TABLE} more"] if len(self) > _IN_A_TABLE else []
        rows = [[_text(getattr(one, name)) for name in names] for one in self[:_IN_A_TABLE]]
        return _table(names, [*rows, *([more] if more else [])])


def _text(value: Any) -> str:
    """A field as people read it: words of enums, seconds of times, names of parts."""
    match value:
        case None:
            return ""
        case Enum():
            return str(value.value)
        case datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        case tuple() if all(isinstance(one, str) for one in value):
            return ", ".join(value)
        case _:
            return str(value)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; texts from servers are escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
