"""A progress bar of a wait: by tqdm in a notebook, by rich on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from headrace_client.errors import PackageMissing
from headrace_client.extras import needing
from headrace_client.values import Extraction, Model, ModelState, Residency, ResidencyState, Transfer

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How far a piece of work is, in units of `unit`; `total` is None while it is not known."""

    phase: str
    done: float
    total: float | None
    unit: str


class Bar(Protocol):
    """A bar on the screen."""

    def show(self, now: Measure) -> None:
        """Draws the present state."""

    def close(self) -> None:
        """Leaves the last state on the screen."""


@contextmanager
def told(
    title: str,
    on_progress: Callable[[_T], None] | None,
    *,
    progress: bool,
    measure: Callable[[_T], Measure],
    open_bar: Callable[[str], Bar] | None = None,
) -> Iterator[Callable[[_T], None]]:
    """Yields a function that draws a state, if `progress`, and passes it on to `on_progress`."""
    bar = (open_bar or bar_for_screen)(title) if progress else None

    def tell(state: _T) -> None:
        if bar is not None:
            bar.show(measure(state))
        if on_progress is not None:
            on_progress(state)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()


def of_extraction(extraction: Extraction) -> Measure:
    """Rows of an extraction, or bytes of the model it loads."""
    if extraction.transfer is not None and not extraction.n_rows:
        return _of_transfer("loading", extraction.transfer)
    total = extraction.n_rows_expected or (extraction.n_rows if extraction.ended else None)
    return Measure(phase=extraction.state.value.lower(), done=extraction.n_rows, total=total, unit="rows")


def of_model(model: Model) -> Measure:
    """Bytes of a model's files."""
    return _of_transfer(model.state.value.lower(), model.transfer, ended=model.state is ModelState.READY)


def of_residency(residency: Residency) -> Measure:
    """Bytes of a model on its way into memory."""
    ended = residency.state is ResidencyState.RESIDENT
    return _of_transfer(residency.state.value.lower(), residency.transfer, ended=ended)


def _of_transfer(phase: str, transfer: Transfer | None, *, ended: bool = False) -> Measure:
    if ended or transfer is None:
        return Measure(phase=phase, done=float(ended), total=1.0 if ended else None, unit="B")
    return Measure(phase=phase, done=transfer.done_bytes, total=transfer.total_bytes, unit="B")


def bar_for_screen(title: str) -> Bar:
    """Opens a bar. Raises PackageMissing if neither tqdm nor rich is installed."""
    kinds: list[Callable[[str], Bar]] = [_TqdmBar, _RichBar]
    if "ipykernel" not in sys.modules:  # Only in a notebook is tqdm's the better one.
        kinds.reverse()
    try:
        return kinds[0](title)
    except PackageMissing:
        return kinds[1](title)


class _TqdmBar:
    def __init__(self, title: str) -> None:
        with needing("headrace[progress]"):
            from tqdm.auto import tqdm  # noqa: PLC0415
        self._title = title
        self._bar: Any = tqdm(desc=title, unit_scale=True)

    def show(self, now: Measure) -> None:
        bar = self._bar
        bar.total, bar.unit = now.total, now.unit
        bar.set_description(f"{self._title} {now.phase}", refresh=False)
        bar.n = now.done
        bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _RichBar:
    def __init__(self, title: str) -> None:
        with needing("headrace[progress]"):
            from rich.console import Console  # noqa: PLC0415
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
        self._title = title
        text = TextColumn("{task.description}", markup=False)
        self._rich: Any = Progress(
            text, BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        )
        self._rich.start()
        self._task = self._rich.add_task(title, total=None)

    def show(self, now: Measure) -> None:
        self._rich.update(self._task, description=f"{self._title} {now.phase}", completed=now.done, total=now.total)

    def close(self) -> None:
        self._rich.stop()
