"""`AsyncHeadraceClient`: the calls of the client as coroutines and its watches as async iterators.

Every entry below names a method of the synchronous client and has its parameters, result and errors. It runs in a
thread of the client's own pool; cancelling the coroutine cancels its gRPC call. Callbacks (`on_progress`) are called on
the event loop. Streams of rows (`chunks`, `activations`) are for the synchronous client: they hand out memory.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from headrace_client.client import HeadraceClient
from headrace_client.corpora import Corpora
from headrace_client.extractions import Extractions
from headrace_client.models import Models
from headrace_client.pins import Pins
from headrace_client.residencies import Residencies
from headrace_client.rpc.calls import CALLS, Calls
from headrace_client.rpc.endpoint import DEADLINE_S
from headrace_client.sets import Sets

# Most calls at once; further ones wait for a thread. A watch takes one while it waits for its next event.
MAX_CALLS = 64

_P = ParamSpec("_P")
_R = TypeVar("_R")
_END = object()


class AsyncPart:
    """A part of the client: the synchronous object, and the threads in which its methods run."""

    def __init__(self, sync: Any, threads: ThreadPoolExecutor) -> None:
        self._sync = sync
        self._threads = threads


class coroutine(Generic[_P, _R]):  # noqa: N801 - read as a decorator of the methods below.
    """Makes a coroutine function of a synchronous method."""

    def __init__(self, method: Callable[Concatenate[Any, _P], _R]) -> None:
        self._method = method

    def __get__(self, part: AsyncPart, owner: object = None) -> Callable[_P, Coroutine[Any, Any, _R]]:
        method = self._method

        @functools.wraps(method)
        async def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            work = _Work(part._threads)  # noqa: SLF001 - of this module.
            args, kwargs = work.on_loop(args), dict(zip(kwargs, work.on_loop(kwargs.values()), strict=True))  # type: ignore[assignment]
            return await work.run(functools.partial(method, part._sync, *args, **kwargs))  # noqa: SLF001

        return call


class events(Generic[_P, _R]):  # noqa: N801 - as `coroutine`.
    """Makes a function that returns an async iterator of a synchronous method that returns an iterator."""

    def __init__(self, method: Callable[Concatenate[Any, _P], Iterator[_R]]) -> None:
        self._method = method

    def __get__(self, part: AsyncPart, owner: object = None) -> Callable[_P, AsyncIterator[_R]]:
        method = self._method

        @functools.wraps(method)
        async def iterate(*args: _P.args, **kwargs: _P.kwargs) -> AsyncIterator[_R]:
            work = _Work(part._threads)  # noqa: SLF001 - of this module.
            found: Any = await work.run(functools.partial(method, part._sync, *args, **kwargs))  # noqa: SLF001
            try:
                while (event := await work.run(functools.partial(next, found, _END))) is not _END:
                    yield event
            except GeneratorExit:  # The caller leaves its loop early: the connection is closed at once.
                work.cancel()
                raise

        return iterate


class _Work:
    """One method at work in threads, one step after another."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._calls = Calls()
        self._context = contextvars.copy_context()
        self._context.run(CALLS.set, self._calls)

    async def run(self, step: Callable[[], _R]) -> _R:
        """Runs a step in a thread; if this coroutine is cancelled, so is the step's gRPC call."""
        future = self._loop.run_in_executor(self._threads, self._context.run, step)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self.cancel()
            future.add_done_callback(_retrieved)
            raise

    def on_loop(self, arguments: Any) -> tuple[Any, ...]:
        """Makes callbacks among the arguments be called on the event loop."""
        return tuple(
            functools.partial(self._loop.call_soon_threadsafe, argument) if callable(argument) else argument
            for argument in arguments
        )

    def cancel(self) -> None:
        """Cancels the gRPC call under way."""
        self._calls.cancel()


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Takes the error of a step that nobody waits for, so that asyncio does not print it."""
    if not future.cancelled():
        future.exception()


class AsyncModels(AsyncPart):
    """`client.models`."""

    register = coroutine(Models.register)
    get = coroutine(Models.get)
    list = coroutine(Models.list)
    delete = coroutine(Models.delete)
    estimate = coroutine(Models.estimate)
    catalog = coroutine(Models.catalog)
    load_options = coroutine(Models.load_options)
    prepare = coroutine(Models.prepare)
    cancel_preparation = coroutine(Models.cancel_preparation)
    watch = events(Models.watch)
    validate = coroutine(Models.validate)
    attempts = coroutine(Models.attempts)
    note_attempt = coroutine(Models.note_attempt)
    adopt_attempt = coroutine(Models.adopt_attempt)
    wait_ready = coroutine(Models.wait_ready)


class AsyncCorpora(AsyncPart):
    """`client.corpora`."""

    upload = coroutine(Corpora.upload)
    register_path = coroutine(Corpora.register_path)
    register_token_ids = coroutine(Corpora.register_token_ids)
    register_hub = coroutine(Corpora.register_hub)
    register_mix = coroutine(Corpora.register_mix)
    get = coroutine(Corpora.get)
    list = coroutine(Corpora.list)
    delete = coroutine(Corpora.delete)


class AsyncExtractions(AsyncPart):
    """`client.extractions`."""

    estimate = coroutine(Extractions.estimate)
    start = coroutine(Extractions.start)
    get = coroutine(Extractions.get)
    list = coroutine(Extractions.list)
    cancel = coroutine(Extractions.cancel)
    watch = events(Extractions.watch)
    wait = coroutine(Extractions.wait)


class AsyncResidencies(AsyncPart):
    """`client.residencies`."""

    list = coroutine(Residencies.list)
    watch = events(Residencies.watch)
    load = coroutine(Residencies.load)
    wait = coroutine(Residencies.wait)
    unload = coroutine(Residencies.unload)
    evict = coroutine(Residencies.evict)


class AsyncPins(AsyncPart):
    """`client.pins`."""

    pin = coroutine(Pins.pin)
    unpin = coroutine(Pins.unpin)
    list = coroutine(Pins.list)


class AsyncSets(AsyncPart):
    """`client.sets`."""

    list = coroutine(Sets.list)
    get = coroutine(Sets.get)
    verify = events(Sets.verify)
    pin = coroutine(Sets.pin)
    unpin = coroutine(Sets.unpin)
    delete = coroutine(Sets.delete)


class AsyncHeadraceClient(AsyncPart):
    """Registry and extractors for asyncio. Use as an async context manager, or close it.

    async with AsyncHeadraceClient.connect() as client:
        extraction = await client.extractions.start("smollm2", "docs", "blocks.14.hook_resid_post")
        async for event in client.extractions.watch(extraction.id):
            ...
    """

    nodes = coroutine(HeadraceClient.nodes)
    health = coroutine(HeadraceClient.health)
    hookpoints = coroutine(HeadraceClient.hookpoints)
    decode_tokens = coroutine(HeadraceClient.decode_tokens)

    def __init__(self, client: HeadraceClient, *, max_calls: int = MAX_CALLS) -> None:
        threads = ThreadPoolExecutor(max_calls, thread_name_prefix="headrace-call")
        super().__init__(client, threads)
        self.models = AsyncModels(client.models, threads)
        self.corpora = AsyncCorpora(client.corpora, threads)
        self.extractions = AsyncExtractions(client.extractions, threads)
        self.residencies = AsyncResidencies(client.residencies, threads)
        self.pins = AsyncPins(client.pins, threads)
        self.sets = AsyncSets(client.sets, threads)

    @classmethod
    def connect(
        cls,
        registry: str | None = None,
        *,
        extractor: str | None = None,
        token: str | None = None,
        ca_file: str | Path | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Self:
        """Makes a client, as `HeadraceClient.connect` does; connections are opened by the first calls."""
        return cls(
            HeadraceClient.connect(registry, extractor=extractor, token=token, ca_file=ca_file, deadline_s=deadline_s)
        )

    async def close(self) -> None:
        """Closes all connections; calls under way are cancelled."""
        self._sync.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()
