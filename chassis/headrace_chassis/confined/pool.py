"""The server's side: `Confined` starts children from a zygote, runs functions in them, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeAlias

from headrace_chassis.confined.environment import parser_environment
from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import DEFAULT_LIMITS, Refuse
from headrace_chassis.confined.talk import ChildTalk
from headrace_chassis.errors import ParsersBusy, ServiceError, ShuttingDown

log = logging.getLogger(__name__)

_Pair: TypeAlias = tuple[socket.socket, socket.socket]

# Calls at once; each may take a processor and its memory.
DEFAULT_AT_ONCE = 4
# Calls that wait for one of these places. Each waits for seconds at most, so that more would wait for minutes.
_MAX_WAITING = 64
_END_S = 5.0
# A lost zygote is started again once: it dies with the machine's memory, or because of a job.
_STARTS = 2


class Confined:
    """Children for one server. A child has no more environment than it takes to import our modules.

    `errors` is the root of the errors that a function may raise: these arrive as they are. Any other exception, and a
    limit of memory, computing or output, becomes the error that `refuse` makes of it. A child that is lost by accident,
    killed by the system or without an answer for too long raises ParsersBusy: the bytes may not be at fault.
    """

    def __init__(
        self, *, errors: type[ServiceError], preload: Sequence[str] = (), at_once: int = DEFAULT_AT_ONCE
    ) -> None:
        self._errors = {f"{kind.__module__}:{kind.__qualname__}": kind for kind in _tree(errors)}
        self._preload = tuple(preload)
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = None
        self._talks: set[ChildTalk] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="confined")
        self._at_once = at_once
        self._n_calls = 0

    def warm(self) -> None:
        """Starts the process that the children come from, so that the first call need not wait for it."""
        with contextlib.suppress(OSError):
            self._zygote_now()

    @contextmanager
    def open(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        files: Sequence[int] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> Iterator[ChildTalk]:
        """Yields a conversation with a child that runs `function(*files, **arguments)`, and ends the child.

        `files` are descriptors, which the child gets copies of; `arguments` and the answer are JSON.
        """
        talk = self._start(refuse, files, limits)
        try:
            talk.begin(f"{function.__module__}:{function.__qualname__}", arguments)
            yield talk
        finally:
            talk.close()
            with self._lock:
                self._talks.discard(talk)

    def run(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        files: Sequence[int] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> Any:
        """Returns the answer of `function(*files, **arguments)`. Blocks, for no longer than the limits allow."""
        with self.open(function, arguments, refuse=refuse, files=files, limits=limits) as talk:
            for _ in talk:
                pass
            return talk.answer

    async def call(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        refuse: Refuse,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Any:
        """Returns the answer of `function(**arguments)`. Raises ParsersBusy if too many calls wait."""
        with self._lock:
            if self._closed:
                raise ShuttingDown
            if self._n_calls >= self._at_once + _MAX_WAITING:
                raise ParsersBusy
            self._n_calls += 1
            future = self._threads.submit(self.run, function, arguments, refuse=refuse, limits=limits)
        # A cancelled caller leaves; the child goes on until it ends, within its limits.
        future.add_done_callback(self._note_end)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends all children; their callers get ShuttingDown."""
        with self._lock:
            self._closed = True
            talks, zygote = list(self._talks), self._zygote
            self._zygote = None
        for talk in talks:
            talk.cut()
        if zygote is not None:
            zygote.end()
        self._threads.shutdown(wait=False)  # Queued calls still run, and find that this is closed.

    def _note_end(self, _: Future[Any]) -> None:
        with self._lock:
            self._n_calls -= 1

    def _start(self, refuse: Refuse, files: Sequence[int], limits: Limits) -> ChildTalk:
        for start in range(1, _STARTS + 1):
            try:
                zygote = self._zygote_now()
                (channel, childs_channel), (status, zygotes_status) = _two_pairs()
            except OSError as exc:  # No descriptor, process or memory is left; running children go on.
                log.warning("a child can't be started: %s", exc)
                raise ParsersBusy from exc
            with childs_channel, zygotes_status:
                try:
                    zygote.fork((childs_channel.fileno(), zygotes_status.fileno(), *files))
                except OSError as exc:
                    channel.close()
                    status.close()
                    log.warning("the process that children come from is lost: %s", exc)
                    zygote.end()
                    with self._lock:
                        self._zygote = None if self._zygote is zygote else self._zygote
                    if start == _STARTS:
                        raise ParsersBusy from exc
                    continue
            talk = ChildTalk(channel, status, refuse=refuse, limits=limits, errors=self._errors)
            with self._lock:
                if not self._closed:
                    self._talks.add(talk)
                    return talk
            talk.close()
            raise ShuttingDown
        raise AssertionError

    def _zygote_now(self) -> _Zygote:
        with self._lock:
            if self._closed:
                raise ShuttingDown
            if self._zygote is None:
                self._zygote = _Zygote(self._preload)
            return self._zygote


class _Zygote:
    """The process that children are forked from."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.callback(self._control.close)
            self._process = subprocess.Popen(  # noqa: S603 -- our own module
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "headrace_chassis.confined.zygote",
                    str(theirs.fileno()),
                    *preload,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # Panics of libraries; the server hears of them by the child's answer.
                env=parser_environment(),
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            unless_started.pop_all()

    def fork(self, files: Sequence[int]) -> None:
        """Asks for a child with these files; OSError if the process is gone."""
        socket.send_fds(self._control, [b"f"], list(files))

    def end(self) -> None:
        """Ends the process, and its children with it."""
        self._control.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)


def _two_pairs() -> tuple[_Pair, _Pair]:
    first = socket.socketpair()
    try:
        return first, socket.socketpair()
    except OSError:
        for end in first:
            end.close()
        raise


def _tree(root: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)
