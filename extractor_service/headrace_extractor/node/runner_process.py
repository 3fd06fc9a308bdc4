"""A runner on the server's side: a child process that takes commands and answers with events.

The process is started afresh, never forked from the server, so it shares neither interpreter nor device memory with the
server; ending it gives all its memory back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from headrace_extractor.errors import INTERRUPTED, RunnerLost, error_for
from headrace_extractor.node.runner_protocol import MAX_LINE_BYTES, Extract, Failed, Message, Stop, decode, encode

# Most events of a command that wait to be taken; a runner with more waits in its pipe.
_MAX_EVENTS = 256
_EXIT_DEADLINE_S = 10.0
_LAST_LINES_S = 0.2
_TAIL_BYTES = 8192  # As much as the registry keeps of it.
# A stop takes effect after the batch under way, which may take minutes on a CPU.
_STOP_DEADLINE_S = 600.0
RUNNER_COMMAND = (sys.executable, "-m", "headrace_extractor.runner")
# glibc reads this variable when a process begins; other C libraries ignore it.
_TUNABLES = "GLIBC_TUNABLES"
_LARGE_PAGES = "glibc.malloc.hugetlb"

# Signals that an operator, a supervisor or a shell sends. Faults of the process itself are others: SIGSEGV, SIGABRT, …
_FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
_VMSTAT = Path("/proc/vmstat")

logger = logging.getLogger(__name__)


class RunnerProcess:
    """One child process. Commands sent with `run` are carried out one after another."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._events: asyncio.Queue[Message | None] = asyncio.Queue(_MAX_EVENTS)
        self._busy = asyncio.Lock()
        self._draining: asyncio.Task[None] | None = None
        self._n_kills = n_out_of_memory_kills()  # As the latest command began.
        self._reading = asyncio.create_task(self._read(), name=f"runner-{process.pid}")
        self._tail = b""
        self._copying = asyncio.create_task(self._copy_errors(), name=f"runner-log-{process.pid}")

    @classmethod
    async def start(cls, *, environment: Mapping[str, str], command: Sequence[str] = RUNNER_COMMAND) -> RunnerProcess:
        """Starts a runner, whose standard error is copied to this process's, and its end kept as `log_tail`.

        Its malloc asks for pages of 2 MB, which the system may give on request, unless `environment` has a value of its
        own. A forward pass on a CPU goes through hundreds of megabytes: with pages of 4 KB, every thousand floats need
        another entry of the page table, and the system has to clear each new page first.
        """
        tunables = environment.get(_TUNABLES, "")
        if _LARGE_PAGES not in tunables:
            tunables = ":".join(filter(None, (tunables, f"{_LARGE_PAGES}=1")))
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**environment, _TUNABLES: tunables},
            limit=MAX_LINE_BYTES,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def log_tail(self) -> str:
        """The last lines that the process wrote to its standard error; whole lines, 8 KiB at most."""
        tail = self._tail[-_TAIL_BYTES:]
        if len(self._tail) > _TAIL_BYTES:
            tail = tail[tail.find(b"\n") + 1 :]
        return tail.decode(errors="replace")

    @property
    def busy(self) -> bool:
        """True while a command runs; the next command waits for its end."""
        return self._busy.locked()

    async def run(self, command: Message, *, ends: Sequence[type[Message]]) -> AsyncGenerator[Message, None]:
        """Sends a command and yields its events up to one of the types `ends`.

        Raises the error that a `failed` event names, and RunnerLost if the process ends first.
        """
        await self._busy.acquire()
        over = False
        self._n_kills = n_out_of_memory_kills()
        try:
            await self.send(command)
            while not over:
                event = await self._next_event()
                over = isinstance(event, (Failed, *ends)) or event is None
                if event is None:
                    async with asyncio.timeout(_EXIT_DEADLINE_S):
                        await self._process.wait()
                    raise self.lost()
                if isinstance(event, Failed):
                    raise error_for(event.reason, event.message, metadata=event.metadata)
                yield event
        finally:
            if over:
                self._busy.release()
            else:  # The caller takes no more events, and the next command must not get this command's.
                self._draining = asyncio.create_task(self._drain(command, ends), name=f"drain-{self.pid}")

    async def send(self, command: Message) -> None:
        """Sends a command; RunnerLost if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(command))
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise self.lost() from exc

    async def wait(self) -> None:
        """Waits until the process has ended."""
        await self._process.wait()

    async def kill(self) -> None:
        """Ends the process and waits until it is gone, and its memory with it; TimeoutError if it stays."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        async with asyncio.timeout(_EXIT_DEADLINE_S):
            await self._process.wait()
        self._reading.cancel()
        await asyncio.wait({self._copying}, timeout=_LAST_LINES_S)  # A child of its own may hold it open.
        self._copying.cancel()
        await asyncio.gather(self._reading, self._copying, return_exceptions=True)
        if self._draining:
            async with asyncio.timeout(_EXIT_DEADLINE_S):
                await self._draining

    async def _drain(self, command: Message, ends: Sequence[type[Message]]) -> None:
        """Stops an abandoned command and discards its events up to the last; kills a process that does not end it."""
        try:
            async with asyncio.timeout(_STOP_DEADLINE_S):
                if isinstance(command, Extract):
                    await self.send(Stop(set_id=command.set_id))
                while not isinstance(await self._next_event(), (type(None), Failed, *ends)):
                    pass
        except RunnerLost:
            pass
        except TimeoutError:
            logger.warning("runner %d did not stop within %.0f s; it is ended", self.pid, _STOP_DEADLINE_S)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        finally:
            self._busy.release()

    async def _next_event(self) -> Message | None:
        """Returns the next event; None after the last, at every call."""
        event = await self._events.get()
        if event is None:  # The mark stays for the next call.
            self._close_events()
        return event

    def lost(self) -> RunnerLost:
        """Returns the error of a process that has ended, with `interrupted` in its metadata if from outside."""
        code = self._process.returncode
        interrupted = is_from_outside(code, n_kills_before=self._n_kills, n_kills_now=n_out_of_memory_kills())
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        return RunnerLost(
            f"The model's process {self.pid} {how}{' from outside' if interrupted else ''}; it is started again, and "
            "reading resumes at the next row.",
            metadata={"pid": str(self.pid), "exit_status": str(code), INTERRUPTED: str(interrupted).lower()},
            retry_after_s=1.0,
        )

    async def _read(self) -> None:
        """Queues the events of the process until it closes its output; kills it if a line is no event."""
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                await self._events.put(decode(line))
        except ValueError:
            logger.exception("runner %d wrote a line that is no event; it is ended", self.pid)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        finally:
            self._close_events()
        await self._process.wait()

    async def _copy_errors(self) -> None:
        """Copies the standard error of the process until it closes it."""
        if self._process.stderr is None:
            return
        while part := await self._process.stderr.read(_TAIL_BYTES):
            self._tail = (self._tail + part)[-2 * _TAIL_BYTES :]
            with contextlib.suppress(OSError, ValueError):  # This process's own may be closed.
                sys.stderr.write(part.decode(errors="replace"))
                sys.stderr.flush()

    def _close_events(self) -> None:
        """Puts the mark of the end, in place of the oldest event if the queue is full."""
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(None)


def n_out_of_memory_kills(vmstat: Path = _VMSTAT) -> int:
    """Returns how many processes the kernel has killed for want of memory; 0 where it does not count them."""
    try:
        for line in vmstat.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def is_from_outside(returncode: int | None, *, n_kills_before: int, n_kills_now: int) -> bool:
    """True if a process with this return code was ended from outside, as far as can be told.

    While the kernel has killed any process for want of memory, a SIGKILL counts as that.
    """
    if returncode is None or -returncode not in _FROM_OUTSIDE:
        return False
    return -returncode != signal.SIGKILL or n_kills_now == n_kills_before
