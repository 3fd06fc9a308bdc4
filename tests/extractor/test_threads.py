"""What takes long has threads of its own: those that a node's heartbeats need stay free."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fix_extractor import model_info
from headrace.extractor.v1 import corpus_service_pb2 as pb

from chassis.shutdown import Shutdown
from extractor_service import __main__ as extractor
from extractor_service.corpora.store import CorpusStore
from extractor_service.errors import QueueFull
from extractor_service.estimate import RowCount
from extractor_service.hub.client import HubDatasets
from extractor_service.recipe import Recipe
from extractor_service.rpc.corpus_servicer import MAX_INGESTS, CorpusServicer
from extractor_service.values import ExtractionSpec


@pytest.fixture
def going_on():
    """Blocks whoever calls `wait` until the test is over."""
    event = threading.Event()
    yield event
    event.set()


async def assert_threads_are_free(begun, n_begun):
    async with asyncio.timeout(20):
        while len(begun) < n_begun:  # noqa: ASYNC110 -- told by threads
            await asyncio.sleep(0.01)
        await asyncio.to_thread(lambda: None)


@pytest.fixture
def few_threads():
    """As many for everything as can be taken by the tests below."""

    def take():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))

    return take


async def test_ingests_leave_the_threads_of_everything_else_alone(tmp_path, monkeypatch, going_on, few_threads):
    few_threads()
    store, begun = CorpusStore(tmp_path), []

    def ingest_tokens(corpus_id, documents):
        begun.append(corpus_id)
        going_on.wait(60)
        return CorpusStore.ingest_tokens(store, corpus_id, documents)

    monkeypatch.setattr(store, "ingest_tokens", ingest_tokens)
    servicer = CorpusServicer(store, HubDatasets({}), in_use=lambda _: False, shutdown=Shutdown())
    tokens = pb.TokenIdsSource(documents=[pb.TokenDocument(token_ids=[1, 2, 3])])
    requests = [pb.RegisterCorpusRequest(spec=pb.CorpusSpec(id=f"c{n}"), token_ids=tokens) for n in range(MAX_INGESTS)]
    calls = [asyncio.create_task(servicer.RegisterCorpus(request, None)) for request in requests]

    await assert_threads_are_free(begun, MAX_INGESTS)
    going_on.set()
    assert {(await call).corpus.n_documents for call in calls} == {1}


async def test_an_ingest_whose_call_was_cut_keeps_its_place_until_it_ends(tmp_path, monkeypatch, going_on):
    store, begun = CorpusStore(tmp_path), []

    def ingest_tokens(corpus_id, documents):
        begun.append(corpus_id)
        going_on.wait(60)
        return CorpusStore.ingest_tokens(store, corpus_id, documents)

    monkeypatch.setattr(store, "ingest_tokens", ingest_tokens)
    servicer = CorpusServicer(store, HubDatasets({}), in_use=lambda _: False, shutdown=Shutdown())
    tokens = pb.TokenIdsSource(documents=[pb.TokenDocument(token_ids=[1, 2, 3])])
    requests = [pb.RegisterCorpusRequest(spec=pb.CorpusSpec(id=f"c{n}"), token_ids=tokens) for n in range(MAX_INGESTS)]
    calls = [asyncio.create_task(servicer.RegisterCorpus(request, None)) for request in requests]
    await assert_threads_are_free(begun, MAX_INGESTS)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    last = pb.RegisterCorpusRequest(spec=pb.CorpusSpec(id="last"), token_ids=tokens)

    with pytest.raises(QueueFull):
        await servicer.RegisterCorpus(last, None)
    going_on.set()
    async with asyncio.timeout(20):
        while servicer._n_ingests:  # noqa: ASYNC110 -- told by threads
            await asyncio.sleep(0.01)
    assert (await servicer.RegisterCorpus(last, None)).corpus.n_documents == 1


async def test_counts_leave_the_threads_of_everything_else_alone(tmp_path, monkeypatch, going_on, few_threads):
    few_threads()
    begun = []

    def count(*what):
        begun.append(what)
        going_on.wait(60)
        return RowCount(n_rows=7, n_tokens=9, exact=True)

    async def get_model(model_id):
        return model_info(tmp_path)

    monkeypatch.setattr(extractor, "count", count)
    store = CorpusStore(tmp_path)
    store.ingest_tokens("c", [[1, 2, 3]])
    estimator = extractor.Estimator(store, SimpleNamespace(get_model=get_model))
    specs = [
        ExtractionSpec(model_id="m", corpus_id="c", hookpoints=("x",), max_rows=n, recipe=Recipe()) for n in range(4)
    ]
    counting = [asyncio.create_task(estimator.count_rows(spec)) for spec in specs]

    await assert_threads_are_free(begun, extractor.MAX_COUNTS)
    going_on.set()
    assert {(await one).n_rows for one in counting} == {7}
