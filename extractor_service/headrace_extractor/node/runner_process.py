"""A runner as the server sees it: a child process that is sent commands and answers with events.

The process is started afresh (never forked from this one), so it shares neither interpreter nor device memory with the
server; ending it gives all its memory back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence

from headrace_extractor.errors import RunnerLost, error_for
from headrace_extractor.node.runner_protocol import MAX_LINE_BYTES, Extract, Failed, Message, Stop, decode, encode

# Events of a command that nobody has taken yet. The runner waits in its pipe beyond that.
_MAX_EVENTS = 256
_EXIT_DEADLINE_S = 10.0
RUNNER_COMMAND = (sys.executable, "-m", "headrace_extractor.runner")
# glibc reads it when a process begins, other C libraries don't.
_TUNABLES = "GLIBC_TUNABLES"
_LARGE_PAGES = "glibc.malloc.hugetlb"

logger = logging.getLogger(__name__)


class RunnerProcess:
    """One child process; commands that are answered run one after another."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._events: asyncio.Queue[Message | None] = asyncio.Queue(_MAX_EVENTS)
        self._busy = asyncio.Lock()
        self._draining: asyncio.Task[None] | None = None
        self._reading = asyncio.create_task(self._read(), name=f"runner-{process.pid}")

    @classmethod
    async def start(cls, *, environment: Mapping[str, str], command: Sequence[str] = RUNNER_COMMAND) -> RunnerProcess:
        """Starts a runner; its standard error is this process's."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_with_large_pages(environment),
            limit=MAX_LINE_BYTES,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def busy(self) -> bool:
        """True while a command runs; the next one waits for its end."""
        return self._busy.locked()

    async def run(self, command: Message, *, ends: Sequence[type[Message]]) -> AsyncGenerator[Message, None]:
        """Sends a command and yields its events up to one of `ends`.

        Raises the error a `failed` event stands for, and RunnerLost if the process ends first.
        """
        await self._busy.acquire()
        over = False
        try:
            await self.send(command)
            while not over:
                event = await self._next_event()
                over = isinstance(event, (Failed, *ends)) or event is None
                if event is None:
                    async with asyncio.timeout(_EXIT_DEADLINE_S):
                        await self._process.wait()
                    raise self._lost()
                if isinstance(event, Failed):
                    raise error_for(event.reason, event.message, metadata=event.metadata)
                yield event
        finally:
            if over:
                self._busy.release()
            else:  # Nobody listens any more; the next command must not hear this one's events.
                self._draining = asyncio.create_task(self._drain(command, ends), name=f"drain-{self.pid}")

    async def send(self, command: Message) -> None:
        """Sends a command; RunnerLost if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(command))
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise self._lost() from exc

    async def wait(self) -> None:
        """Waits until the process has ended."""
        await self._process.wait()

    async def kill(self) -> None:
        """Ends the process, and waits until the system has taken its memory back."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        async with asyncio.timeout(_EXIT_DEADLINE_S):
            await self._process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        if self._draining:
            async with asyncio.timeout(_EXIT_DEADLINE_S):
                await self._draining

    async def _drain(self, command: Message, ends: Sequence[type[Message]]) -> None:
        """Stops an abandoned command and swallows its events."""
        try:
            if isinstance(command, Extract):
                await self.send(Stop(set_id=command.set_id))
            while not isinstance(await self._next_event(), (type(None), Failed, *ends)):
                pass
        except RunnerLost:
            pass
        finally:
            self._busy.release()

    async def _next_event(self) -> Message | None:
        """The next event; None, again and again, once the process has said its last."""
        event = await self._events.get()
        if event is None:
            self._close_events()
        return event

    def _lost(self) -> RunnerLost:
        code = self._process.returncode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        return RunnerLost(
            f"The model's process {self.pid} {how}; it is started again, and reading resumes at the next row.",
            metadata={"pid": str(self.pid), "exit_status": str(code)},
            retry_after_s=1.0,
        )

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                await self._events.put(decode(line))
        except ValueError:
            logger.exception("runner %d says something that is no event; it is ended", self.pid)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        finally:
            self._close_events()
        await self._process.wait()

    def _close_events(self) -> None:
        """Puts the end mark, in place of an event nobody took if there is no room."""
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(None)


def _with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Lets malloc ask for pages of 2 MB where the system gives them on request, unless the environment has a say.

    A forward pass on a CPU goes through hundreds of megabytes: a page of 4 KB has to be found in the page table every
    thousand floats, and each new one to be cleared by the system first.
    """
    known = environment.get(_TUNABLES, "")
    if _LARGE_PAGES in known:
        return dict(environment)
    return {**environment, _TUNABLES: ":".join(filter(None, (known, f"{_LARGE_PAGES}=1")))}
