"""A table of residencies that stays current, with the last events below it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from headrace_cli.output.tables import Column, layout, table_of, terminal_width

if TYPE_CHECKING:
    from headrace_client import HeadraceClient
    from headrace_client.values import Residency, ResidencyEvent

_N_EVENTS = 12


class LiveResidencies:
    """Redraws once a second. The table is listed anew each time, since leases come and go without an event."""

    def __init__(
        self,
        client: HeadraceClient,
        *,
        model: str,
        columns: Sequence[Column],
        row: Callable[[Residency], Sequence[str]],
        line: Callable[[ResidencyEvent], str],
    ) -> None:
        self._client = client
        self._model = model
        self._columns = columns
        self._row = row
        self._line = line
        self._events: deque[str] = deque(maxlen=_N_EVENTS)
        self._listed: Sequence[Residency] = ()
        self._trouble = ""

    def show(self, events: Iterable[ResidencyEvent]) -> None:
        """Draws until the events end."""
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        with Live(get_renderable=self._drawn, console=Console(), refresh_per_second=1, screen=False):
            for event in events:
                if not event.snapshot:
                    self._events.append(self._line(event))

    def _drawn(self) -> Any:
        from rich.console import Group  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        from headrace_client.errors import HeadraceError  # noqa: PLC0415

        try:
            self._listed = self._client.residencies.list(model=self._model)
            self._trouble = ""
        except HeadraceError as exc:
            # An exception would end rich's drawing thread. The last table stays, marked as out of date.
            self._trouble = f"not current: {exc.message}"
        rows = [self._row(residency) for residency in self._listed]
        table = table_of(self._columns, rows, layout(self._columns, rows, terminal_width()))
        nothing = [] if self._listed else [Text("no model is resident", style="dim")]
        trouble = [Text(self._trouble, style="yellow")] if self._trouble else []
        lines = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._events]
        return Group(table, *nothing, *trouble, Text(""), *lines)
