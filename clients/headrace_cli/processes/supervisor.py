"""Child processes that are started in order, restarted when they crash, and stopped in the opposite order."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_POLL_S = 0.1
_KILL_MARGIN_S = 3.0  # What a server gets beyond its own grace.
_LOG_BYTES = 64 * 1024 * 1024
_TAIL_BYTES = 16 * 1024


class StartFailed(Exception):
    """A child never became ready; the message ends with the last lines of its log."""


@dataclass(kw_only=True)
class Child:
    """One process. `command(addresses)` gives its command line, `addresses` those of the children that are ready."""

    name: str
    command: Callable[[Mapping[str, str]], list[str]]
    ready_file: Path
    log_file: Path
    ready_s: float = 90.0
    process: subprocess.Popen[bytes] | None = None
    address: str = ""
    started_at: float = 0.0
    restart_at: float | None = None
    n_crashes: int = 0
    log: IO[bytes] | None = field(default=None, repr=False)

    @property
    def ready(self) -> bool:
        """True when it runs and has told its address."""
        return self.process is not None and self.process.poll() is None and bool(self.address)


class Supervisor:
    """Keeps children running. `on_event(name, text)` is told what happens, in the calling thread."""

    def __init__(
        self,
        children: list[Child],
        *,
        grace_s: float,
        on_event: Callable[[str, str], None],
        first_backoff_s: float = 0.5,
        most_backoff_s: float = 30.0,
        steady_s: float = 60.0,
    ) -> None:
        self._children = children
        self._grace_s = grace_s
        self._on_event = on_event
        self._first_backoff_s = first_backoff_s
        self._most_backoff_s = most_backoff_s
        self._steady_s = steady_s

    def start(self, stopping: Callable[[], bool]) -> None:
        """Starts all, each when the one before is ready. Raises StartFailed."""
        for child in self._children:
            self._launch(child)
            while not child.address and not stopping():
                time.sleep(_POLL_S)
                self._look(child)
                self._check_first_start(child)

    def run(self, stopping: Callable[[], bool]) -> None:
        """Restarts what crashes, with growing pauses, until told to stop."""
        while not stopping():
            for child in self._children:
                self._keep(child)
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stops all, the last started first; kills what outlives its grace."""
        for child in reversed(self._children):
            process = child.process
            if process is not None and process.poll() is None:
                self._on_event(child.name, "stopping")
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(self._grace_s + _KILL_MARGIN_S)
                except subprocess.TimeoutExpired:
                    self._on_event(child.name, "did not stop in time: killed")
                    process.kill()
                    process.wait(_KILL_MARGIN_S)
            if child.log is not None:
                child.log.close()
                child.log = None

    def _launch(self, child: Child) -> None:
        child.ready_file.parent.mkdir(parents=True, exist_ok=True)
        child.ready_file.unlink(missing_ok=True)
        _open_log(child)
        addresses = {one.name: one.address for one in self._children if one.address}
        child.process = subprocess.Popen(  # noqa: S603 - our own modules.
            child.command(addresses),
            stdin=subprocess.DEVNULL,
            stdout=child.log,
            stderr=child.log,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop them in order.
        )
        child.started_at = time.monotonic()
        child.restart_at = None
        child.address = ""
        self._on_event(child.name, f"starting, process {child.process.pid}")

    def _look(self, child: Child) -> None:
        """Takes the address from the ready file."""
        if child.address or child.process is None or child.process.poll() is not None:
            return
        try:
            child.address = child.ready_file.read_text().strip()
        except FileNotFoundError:
            return
        if child.address:
            self._on_event(child.name, f"ready at {child.address}")

    def _check_first_start(self, child: Child) -> None:
        if child.address:
            return  # What it dies of from now on is a crash like any other.
        code = child.process.poll() if child.process is not None else None
        if code is not None:
            raise StartFailed(f"{child.name} ended with {_ending(code)} before it was ready; {_tail(child.log_file)}")
        if time.monotonic() - child.started_at > child.ready_s:
            raise StartFailed(f"{child.name} was not ready within {child.ready_s:g} s; {_tail(child.log_file)}")

    def _keep(self, child: Child) -> None:
        now = time.monotonic()
        if child.restart_at is not None:
            if now >= child.restart_at:
                self._launch(child)
            return
        self._look(child)
        code = child.process.poll() if child.process is not None else None
        if code is None:
            return
        if now - child.started_at > self._steady_s:
            child.n_crashes = 0
        pause_s = min(self._most_backoff_s, self._first_backoff_s * 2.0**child.n_crashes)
        child.n_crashes += 1
        child.restart_at = now + pause_s
        self._on_event(child.name, f"ended with {_ending(code)}; starts again in {pause_s:g} s; log {child.log_file}")


def _open_log(child: Child) -> None:
    child.log_file.parent.mkdir(parents=True, exist_ok=True)
    if child.log is not None:
        child.log.close()
    if child.log_file.exists() and child.log_file.stat().st_size > _LOG_BYTES:
        child.log_file.replace(child.log_file.with_suffix(".old.log"))
    child.log = child.log_file.open("ab")


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(path: Path, n_lines: int = 5) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()[-n_lines:]
    except OSError:
        lines = []
    return f"last lines of {path}:\n" + "\n".join(lines) if lines else f"{path} is empty"
