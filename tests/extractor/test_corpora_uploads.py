"""Uploads of corpora that say nothing, and what they may not hold up."""

import asyncio
import threading

import pytest

from headrace.extractor.v1 import corpus_service_pb2 as pb
from headrace_chassis.shutdown import Shutdown
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import QueueFull, WaitTimeout
from headrace_extractor.hub.client import HubDatasets
from headrace_extractor.rpc import corpus_servicer
from headrace_extractor.rpc.corpus_servicer import MAX_INGESTS, CorpusServicer


class Pieces:
    """The messages of one upload, as a client sends them: first its spec and a piece, the rest when told."""

    def __init__(self, corpus_id):
        spec = pb.CorpusSpec(id=corpus_id, file_name="notes.txt")
        self._queue = asyncio.Queue()
        self.send(spec=spec)
        self.send(content=b"one\n\n")

    def send(self, **part):
        self._queue.put_nowait(pb.UploadCorpusRequest(**part))

    def finish(self):
        self.send(content=b"two")
        self._queue.put_nowait(None)

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await self._queue.get()
        if piece is None:
            raise StopAsyncIteration
        return piece


@pytest.fixture
def store(tmp_path):
    return CorpusStore(tmp_path / "corpora")


@pytest.fixture
def make_servicer(store):
    def make(**options):
        return CorpusServicer(store, HubDatasets({}), in_use=lambda _: False, shutdown=Shutdown(), **options)

    return make


def tokens(corpus_id):
    source = pb.TokenIdsSource(documents=[pb.TokenDocument(token_ids=[1, 2, 3])])
    return pb.RegisterCorpusRequest(spec=pb.CorpusSpec(id=corpus_id), token_ids=source)


def uploading(servicer, pieces):
    return asyncio.create_task(servicer.UploadCorpus(pieces, None))


async def test_idle_uploads_hold_up_no_ingest(make_servicer):
    servicer = make_servicer()
    pieces = [Pieces(f"c{n}") for n in range(4 * MAX_INGESTS)]
    uploads = [uploading(servicer, each) for each in pieces]
    await asyncio.sleep(0.2)

    assert (await servicer.RegisterCorpus(tokens("other"), None)).corpus.n_documents == 1
    last = Pieces("last")
    last.finish()
    assert (await servicer.UploadCorpus(last, None)).corpus.n_documents == 2
    for each in pieces:
        each.finish()
    assert {(await upload).corpus.n_documents for upload in uploads} == {2}


async def test_an_upload_that_falls_silent_is_ended_and_leaves_nothing(make_servicer, store, tmp_path):
    servicer = make_servicer(upload_silence_s=0.2)
    for pieces in (Pieces("c"), EmptyPieces()):
        with pytest.raises(WaitTimeout, match=r"No piece of the upload came for 0\.2 s"):
            await servicer.UploadCorpus(pieces, None)

    assert list((tmp_path / "corpora").iterdir()) == []
    assert store.list()[0] == []


class EmptyPieces(Pieces):
    """An upload without even a first message."""

    def __init__(self):
        self._queue = asyncio.Queue()


async def test_uploads_have_a_bound(make_servicer, monkeypatch):
    monkeypatch.setattr(corpus_servicer, "MAX_UPLOADS", 2)
    servicer = make_servicer()
    pieces = [Pieces(f"c{n}") for n in range(2)]
    uploads = [uploading(servicer, each) for each in pieces]
    await asyncio.sleep(0.1)

    with pytest.raises(QueueFull) as full:
        await servicer.UploadCorpus(Pieces("c"), None)

    assert full.value.retry_after_s
    for each in pieces:
        each.finish()
    await asyncio.gather(*uploads)


async def test_an_upload_that_is_here_waits_for_a_place(make_servicer, store, monkeypatch):
    go_on = threading.Event()

    def ingest_tokens(corpus_id, documents):
        go_on.wait(30)
        return CorpusStore.ingest_tokens(store, corpus_id, documents)

    monkeypatch.setattr(store, "ingest_tokens", ingest_tokens)
    servicer, pieces = make_servicer(), Pieces("here")
    upload = uploading(servicer, pieces)
    await asyncio.sleep(0.1)
    busy = [asyncio.create_task(servicer.RegisterCorpus(tokens(f"c{n}"), None)) for n in range(MAX_INGESTS)]
    await asyncio.sleep(0.1)

    with pytest.raises(QueueFull):
        await servicer.UploadCorpus(Pieces("late"), None)
    pieces.finish()
    await asyncio.sleep(0.2)
    assert not upload.done()
    go_on.set()
    assert (await upload).corpus.n_documents == 2
    await asyncio.gather(*busy)
