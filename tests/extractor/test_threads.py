"""What takes long has threads of its own: those that a node's heartbeats need stay free."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from fix_extractor import model_info
from headrace.extractor.v1 import corpus_service_pb2 as pb
from headrace_chassis.shutdown import Shutdown
from headrace_extractor.corpora.counting import RowCount
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import ModelChanged, QueueFull
from headrace_extractor.extractions import estimates, extractions
from headrace_extractor.hub.client import HubDatasets
from headrace_extractor.rpc.corpus_servicer import MAX_INGESTS, CorpusServicer
from headrace_extractor.sets.spec import ExtractionSpec


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


@pytest.fixture
def ingesting(tmp_path, monkeypatch, going_on):
    """A servicer whose ingests wait for `going_on`, and the ids of those that have begun."""
    store, begun = CorpusStore(tmp_path), []

    def ingest_tokens(corpus_id, documents):
        begun.append(corpus_id)
        going_on.wait(60)
        return CorpusStore.ingest_tokens(store, corpus_id, documents)

    monkeypatch.setattr(store, "ingest_tokens", ingest_tokens)
    return CorpusServicer(store, HubDatasets({}), in_use=lambda _: False, shutdown=Shutdown()), begun


async def register(servicer, corpus_id):
    tokens = pb.TokenIdsSource(documents=[pb.TokenDocument(token_ids=[1, 2, 3])])
    request = pb.RegisterCorpusRequest(spec=pb.CorpusSpec(id=corpus_id), token_ids=tokens)
    return await servicer.RegisterCorpus(request, None)


async def test_ingests_leave_the_threads_of_everything_else_alone(ingesting, going_on, few_threads):
    few_threads()
    servicer, begun = ingesting
    calls = [asyncio.create_task(register(servicer, f"c{n}")) for n in range(MAX_INGESTS)]

    await assert_threads_are_free(begun, MAX_INGESTS)
    going_on.set()
    assert {(await call).corpus.n_documents for call in calls} == {1}


async def test_an_ingest_whose_call_was_cut_keeps_its_place_until_it_ends(ingesting, going_on):
    servicer, begun = ingesting
    calls = [asyncio.create_task(register(servicer, f"c{n}")) for n in range(MAX_INGESTS)]
    await assert_threads_are_free(begun, MAX_INGESTS)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)

    with pytest.raises(QueueFull):
        await register(servicer, "last")
    going_on.set()
    async with asyncio.timeout(20):
        while servicer._n_ingests:  # noqa: ASYNC110 -- told by threads
            await asyncio.sleep(0.01)
    assert (await register(servicer, "last")).corpus.n_documents == 1


async def test_counts_leave_the_threads_of_everything_else_alone(tmp_path, monkeypatch, going_on, few_threads):
    few_threads()
    begun = []

    def count(*what):
        begun.append(what)
        going_on.wait(60)
        return RowCount(n_rows=7, n_tokens=9, exact=True)

    async def get_model(model_id):
        return model_info(tmp_path)

    monkeypatch.setattr(estimates, "count", count)
    store = CorpusStore(tmp_path)
    store.ingest_tokens("c", [[1, 2, 3]])
    counter = estimates.CorpusRowCounter(store, SimpleNamespace(get_model=get_model))
    specs = [
        ExtractionSpec(model_id="m", corpus_id="c", hookpoints=("x",), max_rows=n, recipe=Recipe()) for n in range(4)
    ]
    counting = [asyncio.create_task(counter.count(spec)) for spec in specs]

    await assert_threads_are_free(begun, estimates.MAX_COUNTS)
    going_on.set()
    assert {(await one).n_rows for one in counting} == {7}


async def test_digests_of_models_leave_the_threads_of_everything_else_alone(
    tmp_path, monkeypatch, going_on, few_threads
):
    few_threads()
    begun = []

    def check_files(folder, files):
        begun.append(folder)
        going_on.wait(60)
        raise ModelChanged("Over.")

    async def get_model(model_id):
        return model_info(tmp_path)

    monkeypatch.setattr(extractions, "check_files", check_files)
    models, node = SimpleNamespace(get_model=get_model), SimpleNamespace(epoch=1)
    own = extractions.Extractions(
        tmp_path, models=models, corpora=None, node=node, counter=None, device_id="cpu", registry=None
    )
    spec = ExtractionSpec(model_id="m", corpus_id="c", hookpoints=("x",), recipe=Recipe())
    checks = [asyncio.create_task(own.estimate(spec)) for _ in range(4)]

    await assert_threads_are_free(begun, 2)
    going_on.set()
    assert {type(found) for found in await asyncio.gather(*checks, return_exceptions=True)} == {ModelChanged}
    await own.close()
