"""Starts a runner: `python -m headrace_extractor.runner`, commands on standard input, events on standard output."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from typing import BinaryIO

from headrace_extractor.runner.process import EventSink, Runner

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SPINS = "10000"  # Of GNU's OpenMP, a few tenths of a millisecond; by default it spins 30 times as long.


def main() -> None:
    """Runs until standard input ends or the process is killed."""
    # SIGTERM ends a runner at once, as a kill would: the log survives that. Ctrl-C in a terminal goes to the whole
    # process group, and the server decides what becomes of its runners.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # On Linux the system kills this process when the server's thread that started it ends. Elsewhere only the end of
    # input ends it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["HF_HUB_OFFLINE"] = "1"  # Read when transformers is imported, later.
    # How long OpenMP's threads spin while they wait for one another; read when torch is imported, later. A trainer
    # often shares the cores with this process: threads that spin as long as GNU's do by default take its time. Threads
    # that sleep at once are woken a thousand times a second, which takes a tenth of a small model's time.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    runner = Runner(EventSink(_keep_stdout_for_events()).emit)
    threading.Thread(
        target=runner.read_commands, args=(_keep_stdin_for_commands(),), name="commands", daemon=True
    ).start()
    runner.run()


def _keep_stdin_for_commands() -> BinaryIO:
    """Returns standard input under a new descriptor; libraries that ask a question find its end from now on."""
    commands = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 -- no path of ours
        os.dup2(nothing.fileno(), 0)
    return commands


def _keep_stdout_for_events() -> int:
    """Returns a new descriptor of standard output; prints of libraries go to standard error from now on."""
    events_fd = os.dup(1)
    os.dup2(2, 1)
    return events_fd


if __name__ == "__main__":
    main()
