"""The life of a child process: it sets its limits, runs one function, and ends."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from headrace_chassis.confined.limits import Limits, allow_cpu, limit_memory
from headrace_chassis.confined.wire import (
    ANSWER,
    ERROR,
    FAULT,
    ITEM,
    JOB,
    OVER_MEMORY,
    OVER_OUTPUT,
    REPLY,
    receive,
    send,
)
from headrace_chassis.errors import ServiceError

_MAX_JOB_BYTES = 256 * 1024 * 1024
_MAX_TEXT = 2000
_PR_SET_PDEATHSIG = 1
_LINUX = sys.platform == "linux"
# Loaded before the fork: a library that a hundred children look for is found once.
_LIBC = ctypes.CDLL(None) if _LINUX else None


def live(channel_fd: int, files: Sequence[int], *, zygote: int) -> NoReturn:
    """Runs one job and ends this process, which was just forked."""
    try:
        leave_zygote({0, 1, 2, channel_fd, *files}, zygote)
        channel = socket.socket(fileno=channel_fd)
        kind, content = receive(channel, max_bytes=_MAX_JOB_BYTES)
        assert kind == JOB
        run_job(channel, json.loads(content), files)
    except MemoryError:
        os._exit(OVER_MEMORY)
    except BaseException:  # noqa: BLE001 -- the server is gone, or broken: nobody is left to tell.
        os._exit(1)
    os._exit(0)


def leave_zygote(kept: set[int], zygote: int) -> None:
    """Gives back what belongs to the zygote, and makes this process end with it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != zygote:
            os._exit(1)
    first = 0
    for fd in sorted(kept):
        if first < fd:  # Python takes the empty range before 0 for all descriptors.
            os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def run_job(channel: socket.socket, job: Mapping[str, Any], files: Sequence[int]) -> None:
    """Runs the function that the job names, within its limits, and sends its answer or error."""
    limits = Limits(**job["limits"])
    limit_memory(limits)
    allow_cpu(limits)
    try:
        module, _, name = job["function"].partition(":")
        result = getattr(importlib.import_module(module), name)(*files, **job["arguments"])
        if inspect.isgenerator(result):
            result = converse(channel, result, limits)
        _say(channel, ANSWER, result, limits)
    except MemoryError:
        os._exit(OVER_MEMORY)
    except ServiceError as exc:
        error = {
            "kind": f"{type(exc).__module__}:{type(exc).__qualname__}",
            "message": exc.message[:_MAX_TEXT],
            "metadata": exc.metadata,
            "field": exc.field,
            "resource": exc.resource,
            "retry_after_s": exc.retry_after_s,
        }
        _say(channel, ERROR, error, limits)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)
    except BaseException as exc:  # noqa: BLE001 -- a panic of a library in Rust is no Exception.
        what = f"{type(exc).__name__}: {exc}"[:_MAX_TEXT]
        _say(channel, FAULT, {"what": what, "trace": traceback.format_exc(limit=-8)[-_MAX_TEXT:]}, limits)


def converse(channel: socket.socket, steps: Any, limits: Limits) -> Any:
    """Sends each item that a generator yields, hands it the server's reply, and returns its answer."""
    reply = None
    while True:
        try:
            item = steps.send(reply)
        except StopIteration as exc:
            return exc.value
        _say(channel, ITEM, item, limits)
        kind, content = receive(channel, max_bytes=_MAX_JOB_BYTES)
        assert kind == REPLY
        reply = json.loads(content)
        allow_cpu(limits)


def _say(channel: socket.socket, kind: bytes, value: Any, limits: Limits) -> None:
    # Half of a surrogate pair passes as an escape.
    content = json.dumps(value).encode()
    if len(content) > limits.output_bytes:
        os._exit(OVER_OUTPUT)
    send(channel, kind, content)
