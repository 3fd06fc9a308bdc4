"""Progress on standard error: a bar on a terminal, a line every two seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer

from headrace_cli.output import formats

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from headrace_client.values import Extraction, Model, Residency, Transfer

_LINE_EVERY_S = 2.0  # Often enough to follow, rare enough for a log file.


class Bar:
    """Shows how far a piece of work is: `with Bar("smollm2") as bar: bar.show("downloading", 0.5, "70 of 140 MiB")`."""

    def __init__(self, title: str, *, terminal: bool | None = None) -> None:
        self._title = title
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._line = ""
        self._printed_at = 0.0

    def __enter__(self) -> Self:
        if self._terminal:
            from rich.console import Console  # noqa: PLC0415
            from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn  # noqa: PLC0415

            self._rich = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(stderr=True),
            )
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=None, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._line:
            self._print()

    def show(self, phase: str, fraction: float | None, text: str) -> None:
        """Shows a phase, the fraction done (None: unknown) and a text."""
        if self._rich is not None and self._task is not None:
            done = {"total": None} if fraction is None else {"total": 100.0, "completed": 100.0 * min(fraction, 1.0)}
            self._rich.update(self._task, description=f"{self._title} {phase}", text=text, **done)
            return
        percent = "" if fraction is None else f" {100 * min(fraction, 1.0):.0f} %"
        self._line = f"{self._title} {phase}{percent}" + (f" · {text}" if text else "")
        if phase != self._phase or time.monotonic() - self._printed_at >= _LINE_EVERY_S:
            self._phase = phase
            self._print()

    def _print(self) -> None:
        typer.echo(self._line, err=True)
        self._line = ""
        self._printed_at = time.monotonic()


def show_model(bar: Bar, model: Model) -> None:
    """Shows the preparation of a model's files."""
    fraction = 1.0 if model.state == "READY" else _fraction(model.transfer)
    bar.show(model.state.lower(), fraction, _moved(model.transfer))


def show_residency(bar: Bar, residency: Residency) -> None:
    """Shows a model's way into memory."""
    place = f"number {residency.queue_position} in the queue" if residency.queue_position else ""
    fraction = 1.0 if residency.state == "RESIDENT" else _fraction(residency.transfer)
    bar.show(residency.state.value.lower(), fraction, _moved(residency.transfer) or place or residency.reason)


def show_extraction(bar: Bar, extraction: Extraction) -> None:
    """Shows an extraction: state, rows, rate, bytes, time left, and the readers it waits for."""
    state = extraction.state.lower()
    if extraction.state == "LOADING":
        loading = (f"model {extraction.model_id}", _moved(extraction.transfer))
        bar.show(state, _fraction(extraction.transfer), " · ".join(filter(None, loading)))
        return
    fraction = extraction.n_rows / extraction.n_rows_expected if extraction.n_rows_expected else None
    if extraction.state == "QUEUED" and extraction.queue_position:
        bar.show(state, fraction, f"number {extraction.queue_position} in the queue")
        return
    facts = [f"{formats.count(extraction.n_rows)} rows", formats.size(extraction.size_bytes)]
    if not extraction.ended:
        facts.append(f"{formats.count(extraction.rows_per_s)} rows/s")
        if extraction.eta_s is not None:
            facts.append(f"{formats.duration(extraction.eta_s)} left")
    if extraction.cached:
        facts.append("all cached, nothing computed")
    if extraction.n_non_finite:
        facts.append(f"{formats.count(extraction.n_non_finite)} non-finite values")
    if extraction.n_documents_skipped:
        facts.append(f"{formats.count(extraction.n_documents_skipped)} documents skipped")
    if extraction.state == "WAITING":
        readers = [f"{reader.reader} at row {formats.count(reader.next_row)}" for reader in extraction.waiting_for]
        facts.append(f"waits for {', '.join(readers) or 'a reader'}")
    bar.show(state, 1.0 if extraction.state == "DONE" else fraction, " · ".join(facts))


def _fraction(transfer: Transfer | None) -> float | None:
    return None if transfer is None or transfer.percent is None else transfer.percent / 100


def _moved(transfer: Transfer | None) -> str:
    if transfer is None or not (transfer.done_bytes or transfer.total_bytes):
        return ""
    text = formats.size(transfer.done_bytes)
    if transfer.total_bytes:
        text += f" of {formats.size(transfer.total_bytes)}"
    if transfer.rate_bytes_per_s:
        text += f" · {formats.size(transfer.rate_bytes_per_s)}/s"
    if transfer.eta_s is not None:
        text += f" · {formats.duration(transfer.eta_s)} left"
    return text
