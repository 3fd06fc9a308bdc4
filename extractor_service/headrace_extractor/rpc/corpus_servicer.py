"""CorpusService: checks a request, calls the store in a thread, fills the answer."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc

from headrace.extractor.v1 import corpus_service_pb2, corpus_service_pb2_grpc
from headrace_chassis.errors import ShuttingDown
from headrace_chassis.shutdown import Shutdown
from headrace_extractor.corpora.spec import Corpus, CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import FieldInvalid, QueueFull, StateConflict, WaitTimeout
from headrace_extractor.hub.client import HubDatasets
from headrace_extractor.requests import Requests, checked_request_id
from headrace_extractor.rpc.convert import corpora as convert

MAX_CONTENT_BYTES = 1024 * 1024
# Files are parsed in children, each of which may take 2 GiB and a core: more at once could take a node's memory.
MAX_INGESTS = 4
# Open uploads take no ingest's place while their pieces come in: a client that says nothing must not hold up others.
MAX_UPLOADS = 64
UPLOAD_SILENCE_S = 30.0
# An upload that is here waits so long for a place: to send it again would cost more.
INGEST_WAIT_S = 3600.0

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CorpusServicer(corpus_service_pb2_grpc.CorpusServiceServicer):
    """Serves the corpora of this node."""

    def __init__(
        self,
        store: CorpusStore,
        hub: HubDatasets,
        *,
        in_use: Callable[[str], bool],
        shutdown: Shutdown,
        upload_silence_s: float = UPLOAD_SILENCE_S,
    ) -> None:
        self._store = store
        self._hub = hub
        self._in_use = in_use
        self._shutdown = shutdown
        self._registrations = Requests()
        self._upload_silence_s = upload_silence_s
        self._n_ingests = 0
        self._n_uploads = 0
        self._place_given = asyncio.Event()
        # Datasets take hours: they must not block the default threads, which heartbeats need too.
        self._threads = ThreadPoolExecutor(MAX_INGESTS, thread_name_prefix="corpora")
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="uploads")  # More would wait for the same disk.

    async def UploadCorpus(
        self, request_iterator: AsyncIterator[corpus_service_pb2.UploadCorpusRequest], context: Context
    ) -> corpus_service_pb2.UploadCorpusResponse:
        requests = self._pieces(request_iterator)
        async with aclosing(requests):
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "spec":
                raise FieldInvalid("The first message of an upload must hold `spec`.", field="spec")
            if self._n_ingests >= MAX_INGESTS:  # Better refused now than after the last piece.
                raise QueueFull(f"{MAX_INGESTS} corpora are being ingested; try again later.", retry_after_s=2.0)
            if self._n_uploads >= MAX_UPLOADS:
                raise QueueFull(f"{MAX_UPLOADS} uploads are under way; try again later.", retry_after_s=2.0)
            self._n_uploads += 1
            try:
                corpus = await self._receive(convert.corpus_spec_from_pb(first.spec), requests)
            finally:
                self._n_uploads -= 1
        return corpus_service_pb2.UploadCorpusResponse(corpus=convert.corpus_to_pb(corpus))

    async def RegisterCorpus(
        self, request: corpus_service_pb2.RegisterCorpusRequest, context: Context
    ) -> corpus_service_pb2.RegisterCorpusResponse:
        known = self._registrations.recall(checked_request_id(request.request_id))
        if known is not None:
            corpus = self._store.get(known)
        else:
            with self._ingesting():
                corpus = await self._register(request)
        return corpus_service_pb2.RegisterCorpusResponse(corpus=convert.corpus_to_pb(corpus))

    async def GetCorpus(
        self, request: corpus_service_pb2.GetCorpusRequest, context: Context
    ) -> corpus_service_pb2.GetCorpusResponse:
        return corpus_service_pb2.GetCorpusResponse(corpus=convert.corpus_to_pb(self._store.get(request.corpus_id)))

    async def ListCorpora(
        self, request: corpus_service_pb2.ListCorporaRequest, context: Context
    ) -> corpus_service_pb2.ListCorporaResponse:
        corpora, token = self._store.list(request.page_size, request.page_token)
        return corpus_service_pb2.ListCorporaResponse(
            corpora=[convert.corpus_to_pb(corpus) for corpus in corpora],
            next_page_token=token,
            total_size=len(self._store),
        )

    async def DeleteCorpus(
        self, request: corpus_service_pb2.DeleteCorpusRequest, context: Context
    ) -> corpus_service_pb2.DeleteCorpusResponse:
        repeated = self._store.deletions.recall(checked_request_id(request.request_id)) is not None
        if not repeated and self._in_use(request.corpus_id):
            raise StateConflict(
                f"An extraction reads corpus {request.corpus_id}; wait for its end or cancel it.",
                resource=("Corpus", request.corpus_id),
            )
        await asyncio.to_thread(self._store.delete, request.corpus_id, request.request_id)
        return corpus_service_pb2.DeleteCorpusResponse()

    async def _register(self, request: corpus_service_pb2.RegisterCorpusRequest) -> Corpus:
        spec, source = convert.corpus_spec_from_pb(request.spec), request.WhichOneof("source")
        if source == "hub":
            return await self._read_hub(spec, request)
        ingest: Callable[[], Corpus]
        if source == "path":
            ingest = partial(self._store.ingest_path, spec, request.path.path)
        elif source == "token_ids":
            documents = [document.token_ids for document in request.token_ids.documents]
            ingest = partial(self._store.ingest_tokens, spec.id, documents)
        elif source == "mix":
            ingest = partial(self._store.ingest_mix, spec.id, convert.mix_from_pb(request.mix))
        else:
            raise FieldInvalid("Set one of `path`, `token_ids`, `hub` and `mix`.", field="source")
        return await self._in_thread(self._remembered, request.request_id, ingest)

    def _remembered(self, request_id: str, ingest: Callable[[], Corpus]) -> Corpus:
        # In the thread, since it goes on after its call is cut.
        corpus = ingest()
        self._registrations.remember(request_id, corpus.id)
        return corpus

    async def _read_hub(self, spec: CorpusSpec, request: corpus_service_pb2.RegisterCorpusRequest) -> Corpus:
        kind, job = convert.hub_job_from_pb(spec, request.hub)
        left = threading.Event()

        def check() -> None:
            self._shutdown.check()
            if left.is_set():  # The call is over: no answer can be sent any more.
                raise ShuttingDown

        def read() -> Corpus:
            with self._hub.open(job, check) as dataset:
                known = self._store.known(spec.id, dataset.origin)
                return known or self._store.ingest_documents(
                    spec.id, dataset.documents(), origin=dataset.origin, kind=kind
                )

        try:
            return await self._in_thread(self._remembered, request.request_id, read)
        finally:
            left.set()  # A thread is not cancelled with its call.

    async def _receive(
        self, spec: CorpusSpec, requests: AsyncIterator[corpus_service_pb2.UploadCorpusRequest]
    ) -> Corpus:
        upload = self._store.upload(spec)
        try:
            async for request in requests:
                if request.WhichOneof("part") != "content":
                    raise FieldInvalid("Only the first message of an upload may hold `spec`.", field="content")
                if len(request.content) > MAX_CONTENT_BYTES:
                    raise FieldInvalid("A piece of an upload has at most 1 MiB.", field="content")
                # Pieces are written in a thread that no ingest uses.
                await asyncio.get_running_loop().run_in_executor(self._writers, upload.write, request.content)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INGEST_WAIT_S):
                    while self._n_ingests >= MAX_INGESTS:
                        self._place_given.clear()
                        await self._shutdown.race(self._place_given.wait())
            with self._ingesting():
                return await self._in_thread(upload.finish)
        finally:
            # In a default thread: closing must not wait until an ingest's thread is free.
            await asyncio.to_thread(upload.__exit__, *sys.exc_info())

    async def _pieces(
        self, requests: AsyncIterator[corpus_service_pb2.UploadCorpusRequest]
    ) -> AsyncGenerator[corpus_service_pb2.UploadCorpusRequest, None]:
        """Yields the messages of an upload. Raises WaitTimeout if the client falls silent."""
        async with aclosing(self._shutdown.watching(requests)) as pieces:
            while True:
                try:
                    async with asyncio.timeout(self._upload_silence_s):
                        piece = await anext(pieces, None)
                except TimeoutError:
                    raise WaitTimeout(
                        f"No piece of the upload came for {self._upload_silence_s:g} s; upload the file again."
                    ) from None
                if piece is None:
                    return
                yield piece

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Runs a part of an ingest in a thread; if the call is cut, its place stays taken until the thread is done."""
        thread = self._threads.submit(work, *args)
        try:
            return await asyncio.wrap_future(thread)
        except asyncio.CancelledError:
            if not thread.done():
                self._n_ingests += 1
                loop = asyncio.get_running_loop()

                def done(_: Future[T]) -> None:
                    with contextlib.suppress(RuntimeError):  # The loop has ended with the server.
                        loop.call_soon_threadsafe(self._give_place)

                thread.add_done_callback(done)
            raise

    def _give_place(self) -> None:
        self._n_ingests -= 1
        self._place_given.set()

    @contextlib.contextmanager
    def _ingesting(self) -> Iterator[None]:
        """Takes one of the places for ingests while the block runs; QueueFull if all are taken."""
        self._shutdown.check()
        if self._n_ingests >= MAX_INGESTS:
            raise QueueFull(f"{MAX_INGESTS} corpora are being ingested; try again later.", retry_after_s=2.0)
        self._n_ingests += 1
        try:
            yield
        finally:
            self._give_place()
