"""`headrace up` in the background: its start from another process, the note that it is up, and its end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from headrace_cli.processes.only_one import LOCKS_UNSUPPORTED

_POLL_S = 0.1
_START_S = 240.0  # Two servers, each of which may take 90 s to be ready.


class NotStarted(Exception):
    """The process ended before it was up; `error` is what it printed of its error, empty if that is no JSON."""

    def __init__(self, message: str, error: Mapping[str, str]) -> None:
        super().__init__(message)
        self.error = error


def start_detached(words: Sequence[str], *, up_file: Path, log: Path) -> dict[str, str]:
    """Starts `headrace up` in a session of its own; returns its note once both servers are ready. Raises NotStarted."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        began = output.tell()
        # Not forked: the child outlives this process, and what it prints after that goes to the log.
        process = subprocess.Popen(  # noqa: S603 - our own command.
            [sys.executable, "-m", "headrace_cli", "--json", "up", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    end_s, note = time.monotonic() + _START_S, dict[str, str]()
    try:
        while process.poll() is None and note.get("pid") != str(process.pid) and time.monotonic() < end_s:
            time.sleep(_POLL_S)
            note = read_note(up_file)
    except BaseException:  # Ctrl-C: a pair of servers that starts later would be a surprise.
        process.terminate()
        raise
    if note.get("pid") == str(process.pid):
        return note
    if process.poll() is None:
        process.terminate()
        raise NotStarted(f"it was not up within {_START_S:g} s; see {log}", {})
    raise NotStarted(f"it ended before it was up; see {log}", _last_error(log, began))


def write_note(up_file: Path, note: Mapping[str, str]) -> None:
    """Tells other processes that both servers are ready."""
    draft = up_file.with_suffix(".new")
    draft.write_text(json.dumps(note))
    draft.replace(up_file)


def read_note(up_file: Path) -> dict[str, str]:
    """Reads the note; empty without one."""
    try:
        found = json.loads(up_file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds a lock file of `only_one`, and its machine."""

    pid: int
    host: str

    def is_here(self) -> bool:
        """True if the process is on this machine, and runs `headrace up`."""
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return False
        is_ours = any(Path(word).name in ("headrace", "headrace_cli") for word in words)
        return self.host == socket.gethostname() and is_ours and "up" in words


def holder_of(lock: Path) -> Holder | None:
    """Returns the process that holds a lock file of `only_one`; None if none does."""
    try:
        with lock.open("r+") as file:
            pid, _, host = file.read().strip().partition(" ")
            holder = Holder(pid=int(pid), host=host) if pid.isdecimal() else None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder
            except OSError as exc:
                # Where files can't be locked, the file's own word has to do; on this machine it can be checked.
                is_elsewhere = holder is not None and holder.host != socket.gethostname()
                if exc.errno in LOCKS_UNSUPPORTED and holder and (is_elsewhere or holder.is_here()):
                    return holder
            return None
    except FileNotFoundError:
        return None


def stop_detached(lock: Path, holder: Holder, *, wait_s: float, tell: Callable[[], None]) -> bool:
    """Stops the process that holds the lock file; returns False if it still does after `wait_s`."""
    with suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    tell()
    end_s = time.monotonic() + wait_s
    while holder_of(lock) == holder:
        if time.monotonic() > end_s:
            return False
        time.sleep(_POLL_S)
    return True


def _last_error(log: Path, began: int) -> dict[str, str]:
    """Reads the error that a command with `--json` printed last, from byte `began` of its log."""
    with log.open("rb") as file:
        file.seek(began)
        lines = file.read().decode(errors="replace").strip().splitlines()
    for line in reversed(lines):
        with suppress(ValueError, AttributeError):
            if error := json.loads(line).get("error"):
                return {key: str(error.get(key) or "") for key in ("reason", "message", "remedy")}
    return {}
