"""Child processes: servers that write their address to a ready file, and workers that answer lines with JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

ROOT = Path(__file__).resolve().parent.parent
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 15.0


class ProcessFailed(RuntimeError):
    """A child process ended, or did not answer in time."""


@contextmanager
def server(module: str, arguments: Sequence[str], *, work_dir: Path) -> Iterator[tuple[str, int]]:
    """Runs `python -m module` with `--ready-file`; yields its address and process id; ends it after the block."""
    ready = work_dir / f"{module}-{time.monotonic_ns()}.ready"
    log = ready.with_suffix(".log")
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--ready-file", str(ready)],
            cwd=ROOT,
            stderr=stderr,
            # A registry uses its embedded Postgres, not a database of the environment.
            env={name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
        )
    try:
        yield _address(process, ready, log), process.pid
    finally:
        _end(process)


class Worker:
    """A process that answers each line of JSON with one line of JSON."""

    def __init__(self, module: str, arguments: Sequence[str], *, python: Path = Path(sys.executable)) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [str(python), "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ask(self, question: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """Sends a question and returns the answer. A worker that takes longer is killed, which raises ProcessFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(deadline_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise ProcessFailed(f"{self._module} ended, or took longer than {deadline_s:.0f} s; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        _end(self._process)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def questions() -> Iterator[dict[str, Any]]:
    """The worker's side: yields questions until standard input ends."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(value: dict[str, Any], stream: TextIO | None = None) -> None:
    """The worker's side: answers one question, on `stream` or standard output."""
    stream = stream or sys.stdout
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def answer_with_rows(source: Callable[[dict[str, Any]], Iterable[int]], stream: TextIO) -> None:
    """Answers each question `{n_rows, at_most_s, ...}` with the number of rows from `source`, and their seconds."""
    for question in questions():
        n_rows, began = 0, time.perf_counter()
        for some in source(question):
            n_rows += some
            if n_rows >= question["n_rows"] or time.perf_counter() - began > question["at_most_s"]:
                break
        answer({"n_rows": n_rows, "seconds": time.perf_counter() - began}, stream)


def announce(path: Path, address: str) -> None:
    """The server's side: writes the ready file, whole or not at all."""
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(address)
    draft.replace(path)


def rss_bytes(pid: int, field: str = "VmRSS") -> int:
    """Returns a memory figure of a process, from /proc (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def cpu_s(pid: int) -> float:
    """Returns the CPU seconds that a process has used, in all its threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _address(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    end = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end:
        if ready.exists():
            return ready.read_text()
        if process.poll() is not None:
            break
        time.sleep(0.02)
    tail = log.read_text()[-2000:]
    raise ProcessFailed(f"the server did not come up in {START_DEADLINE_S:.0f} s; it said: {tail}")


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_DEADLINE_S)
