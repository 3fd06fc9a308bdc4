"""Functions that behave badly in a child process, and the two ways to run them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace_chassis.confined.in_process import InProcess
from headrace_chassis.confined.pool import Confined
from headrace_chassis.errors import ServiceError


class ReadError(ServiceError):
    """Root of the errors that the functions raise."""


class NotThis(ReadError):
    """The one error that a function raises on purpose."""


class Refused(ReadError):
    """The error that the tests make of a refusal."""


class OtherError(ServiceError):
    """Outside of the tree."""


@pytest.fixture(scope="session")
def confined_for_all() -> Iterator[Confined]:
    """Children for tests that do not end the process these come from."""
    confined = Confined(errors=ReadError, preload=("fix_confined",))
    yield confined
    confined.close()


@pytest.fixture(params=["child", "in process"])
def confinement(request, confined_for_all):
    """Each implementation of the port."""
    return confined_for_all if request.param == "child" else InProcess()


def add(a: int, b: int) -> int:
    return a + b


def read_files(*files: int) -> list[str]:
    return [open(file, closefd=False).read() for file in files]


def count_to(n: int) -> Iterator[int]:
    for i in range(n):
        reply = yield i
        assert reply is None
    return "counted"


def double() -> Iterator[Any]:
    number = yield "ready"
    while True:
        number = yield 2 * number


def refuse_on_purpose() -> None:
    raise NotThis("Not this one.", metadata={"line": "3"}, field="spec", resource=("corpus", "a"), retry_after_s=1.5)


def raise_other() -> None:
    raise OtherError("An error of another tree.")


def break_off(after: int) -> Iterator[int]:
    yield from range(after)
    raise KeyError("nothing")


def recurse() -> None:
    recurse()


def panic() -> None:
    raise BaseException("as a library in Rust does")  # noqa: TRY002


def take_memory(n_bytes: int) -> int:
    return len(bytearray(n_bytes))


def compute_for_ever() -> None:
    while True:
        pass


def compute_between_items(seconds: float) -> Iterator[int]:
    for i in range(3):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        yield i


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def say_much(n_bytes: int) -> str:
    return "x" * n_bytes


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


def read_null() -> None:
    ctypes.string_at(0)


def end_quietly() -> None:
    os._exit(5)


def pid_then_sleep() -> Iterator[int]:
    yield os.getpid()
    time.sleep(60)


def environment() -> dict[str, str]:
    return dict(os.environ)


def open_files() -> list[str]:
    return [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.exists()]


def parent_pid() -> int:
    return os.getppid()


def serve() -> None:
    """A server that is killed while its child works; prints the child's process id."""
    owner = Confined(errors=ReadError, preload=("fix_confined",))
    with owner.open(pid_then_sleep, {}, refuse=Refused) as talk:
        for pid in talk:
            sys.stdout.write(f"{pid}\n")
            sys.stdout.flush()
            signal.pause()
