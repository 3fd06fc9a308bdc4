"""Runners forked from a process that has imported torch and transformers: 0.1 core-seconds each instead of 3.3.

The product starts its runners afresh, and so do the tests of that (`tests/runner/test_runner_process.py`,
`tests/extractor/test_spare_runners.py`, all of `tests/system`). Tests of a runner that runs take `forked_runners`. Such
a runner is a process of its own and a child of this one, with its own pipes; it lives and dies as a fresh one does. It
shares the pages of its imports with the others, so its memory must not be measured.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from headrace_extractor.node.runner_process import RunnerProcess
from headrace_extractor.node.runner_protocol import MAX_LINE_BYTES
from headrace_extractor.runner.__main__ import main

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_LONGEST_MESSAGE = 1 << 18
# The imports, on a machine where everything else runs as well.
_START_DEADLINE_S = 120.0


class ForkServer:
    """Starts runners from a process that begins to import at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_START_DEADLINE_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    def fork(self, environment: dict[str, str]) -> tuple[int, int, int]:
        """Starts a runner; returns its process id and the descriptors of its standard input and output."""
        with self._lock:
            child_in, stdin = os.pipe()
            stdout, child_out = os.pipe()
            # The runner's parent ends at once, and this process becomes its parent: it may wait for it.
            libc = ctypes.CDLL(None)
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [json.dumps(environment).encode()], [child_in, child_out])
                pid = int(self._socket.recv(64))
            finally:
                libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
                os.close(child_in)
                os.close(child_out)
            return pid, stdin, stdout

    async def start(self, *, environment: dict[str, str]) -> RunnerProcess:
        """Implements RunnerFactory."""
        forked = await asyncio.to_thread(self.fork, dict(environment))
        return RunnerProcess(await ForkedProcess.attach(*forked))

    def close(self) -> None:
        """Ends the process; the runners go on."""
        self._socket.close()
        self._process.wait(10)


class ForkedProcess:
    """The part of `asyncio.subprocess.Process` that RunnerProcess needs, for a child that asyncio has not started."""

    def __init__(self, pid: int, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.stderr = None  # It shares that of the tests.
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def attach(cls, pid: int, stdin: int, stdout: int) -> ForkedProcess:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(MAX_LINE_BYTES)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(stdout, "rb", 0))
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(stdin, "wb", 0))
        return cls(pid, asyncio.StreamWriter(transport, protocol, None, loop), reader)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.stdin.close()
        self._ended.set()


@pytest.fixture(scope="session")
def forked_runners():
    """Starts runners without their imports, on Linux; elsewhere fresh ones."""
    if sys.platform != "linux":
        yield RunnerProcess
        return
    server = ForkServer()
    yield server
    server.close()


# -- the other side ----------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Forks a runner for every message, until the connection is closed."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # As a runner's `main` does, before the imports.
    gc.disable()
    import headrace_extractor.runner.models.loading  # noqa: PLC0415 -- not in the process that runs the tests
    import headrace_extractor.runner.passes.extract  # noqa: F401, PLC0415

    gc.freeze()
    gc.enable()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_MESSAGE, 2)
        if not message:
            return
        between = os.fork()
        if between == 0:
            _become_runner(connection, json.loads(message), *descriptors)
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become_runner(connection: socket.socket, environment: dict[str, str], stdin: int, stdout: int) -> None:
    between = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == between:  # `main` asks to be killed with its parent: from here on, the process of the tests.
        time.sleep(0.001)
    connection.send(str(os.getpid()).encode())
    connection.close()
    for source, target in ((stdin, 0), (stdout, 1)):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(environment)
    try:
        main()
    finally:
        os._exit(1)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        serve(given)
