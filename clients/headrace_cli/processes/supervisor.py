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
_KILL_MARGIN_S = 3.0  # Time beyond a server's own grace, in which it ends its children.
_LOG_BYTES = 64 * 1024 * 1024  # A larger log is set aside at the next start, so that two of them bound the disk space.
_TAIL_BYTES = 16 * 1024


class StartFailed(Exception):
    """A child never became ready; the message ends with the last lines of its log."""


@dataclass(kw_only=True)
class Child:
    """One process. `command(addresses)` returns its command line, given the addresses of the ready children by name."""

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
        """True when the process runs and has written its address to the ready file."""
        return self.process is not None and self.process.poll() is None and bool(self.address)


class Supervisor:
    """Keeps children running. It calls `on_event(name, text)` for each start, end and crash, in the calling thread."""

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

    @property
    def addresses(self) -> dict[str, str]:
        """Addresses of the children by name; empty for one that is not ready."""
        return {child.name: child.address for child in self._children}

    def start(self, stopping: Callable[[], bool]) -> None:
        """Starts all children, each after its predecessor is ready. Raises StartFailed."""
        for child in self._children:
            process = self._launch(child)
            while not child.address and not stopping():
                time.sleep(_POLL_S)
                self._read_address(child)
                if child.address:
                    break  # From now on, the end of its process is a crash: `run` starts it again.
                if (code := process.poll()) is not None:
                    # A server that can't start says why in its last line, after its own name.
                    why = "".join(_last_lines(child.log_file, 1))
                    if why.startswith(f"{child.name}: "):
                        raise StartFailed(why)
                    problem = f"ended with {_ending(code)} before it was ready"
                elif time.monotonic() - child.started_at > child.ready_s:
                    problem = f"was not ready within {child.ready_s:g} s"
                else:
                    continue
                raise StartFailed(f"{child.name} {problem}; {_tail(child.log_file)}")

    def run(self, stopping: Callable[[], bool]) -> None:
        """Restarts children that crash, with growing pauses, until `stopping()`."""
        while not stopping():
            for child in self._children:
                self._keep(child)
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stops all children, the last started first; kills a child that outlives its grace."""
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

    def _launch(self, child: Child) -> subprocess.Popen[bytes]:
        child.ready_file.parent.mkdir(parents=True, exist_ok=True)
        child.ready_file.unlink(missing_ok=True)
        child.log_file.parent.mkdir(parents=True, exist_ok=True)
        if child.log is not None:
            child.log.close()
        if child.log_file.exists() and child.log_file.stat().st_size > _LOG_BYTES:
            child.log_file.replace(child.log_file.with_suffix(".old.log"))
        child.log = child.log_file.open("ab")
        addresses = {other.name: other.address for other in self._children if other.address}
        child.process = subprocess.Popen(  # noqa: S603 - our own modules.
            child.command(addresses),
            stdin=subprocess.DEVNULL,
            stdout=child.log,
            stderr=child.log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the children in order.
        )
        child.started_at = time.monotonic()
        child.restart_at = None
        child.address = ""
        self._on_event(child.name, f"starting, process {child.process.pid}")
        return child.process

    def _read_address(self, child: Child) -> None:
        """Takes the address from the ready file, once the process has written it."""
        if child.address or child.process is None or child.process.poll() is not None:
            return
        try:
            child.address = child.ready_file.read_text().strip()
        except FileNotFoundError:
            return
        if child.address:
            self._on_event(child.name, f"ready at {child.address}")

    def _keep(self, child: Child) -> None:
        """Restarts the child when its pause is over; begins such a pause when its process has ended."""
        now = time.monotonic()
        if child.restart_at is not None:
            if now >= child.restart_at:
                self._launch(child)
            return
        self._read_address(child)
        code = child.process.poll() if child.process is not None else None
        if code is None:
            return
        if now - child.started_at > self._steady_s:  # It ran well for a while: pauses begin short again.
            child.n_crashes = 0
        pause_s = min(self._most_backoff_s, self._first_backoff_s * 2.0**child.n_crashes)
        child.n_crashes += 1
        child.restart_at = now + pause_s
        self._on_event(child.name, f"ended with {_ending(code)}; starts again in {pause_s:g} s; log {child.log_file}")


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(path: Path, n_lines: int = 5) -> str:
    lines = _last_lines(path, n_lines)
    return f"last lines of {path}:\n" + "\n".join(lines) if lines else f"{path} is empty"


def _last_lines(path: Path, n_lines: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip().splitlines()[-n_lines:]
    except OSError:
        return []
