"""The command line on a terminal of a given size, and on a pipe that nobody reads."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_DEADLINE_S = 45


class Screen:
    """A finished command: its exit status, and its lines as the terminal got them, without colours."""

    def __init__(self, code, text):
        self.code = code
        self.text = _ESCAPE.sub("", text).replace("\r\n", "\n")
        self.lines = [line.rstrip() for line in self.text.splitlines()]

    @property
    def width(self):
        return max(map(len, self.lines), default=0)


def on_terminal(arguments, *, columns=80, rows=24, environment=None):
    """Runs `headrace` with standard output and error on a terminal; returns its Screen."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace_cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=kept | {"TERM": "xterm"} | (environment or {}),
    )
    os.close(theirs)
    parts, end_s = [], time.monotonic() + _DEADLINE_S
    try:
        while time.monotonic() < end_s:
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # The last process on the terminal has closed it.
                break
            if not part:
                break
            parts.append(part)
    finally:
        os.close(ours)
        if process.poll() is None and time.monotonic() >= end_s:
            process.kill()
    return Screen(process.wait(10), b"".join(parts).decode())


def into_closed_pipe(arguments, *, module="headrace_cli", environment=None):
    """Runs a module with a standard output that has no reader any more, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
            env=os.environ | (environment or {}),
        )
    finally:
        os.close(writer)


@pytest.fixture
def terminal(registry_host):
    """Runs `headrace` on a terminal, with the scripted registry."""

    def run(*arguments, **size):
        return on_terminal(["--registry", registry_host.address, *arguments], **size)

    return run
