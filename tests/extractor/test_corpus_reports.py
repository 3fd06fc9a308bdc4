"""One corpus id names the same documents on every node: the registry is asked before a corpus is kept."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from headrace_chassis.dialing import Credentials
from headrace_extractor.corpora import reports as corpus_reports
from headrace_extractor.corpora.reports import CorpusReports
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import AlreadyExists, CorpusNotFound, RegistryUnavailable
from headrace_extractor.node.values import Device, Machine
from headrace_extractor.rpc.registry_client import RegistryClient


class FakeCorpusRegistry:
    """Holds the corpora of other nodes; away while `away` is set."""

    def __init__(self):
        self.others = {}
        self.away = False
        self.asked = []
        self.whole = []

    async def report_corpora(self, epoch, digests, *, everything):
        if self.away:
            raise RegistryUnavailable("away")
        if everything:
            self.whole.append((epoch, dict(digests)))
            return
        self.asked.append(dict(digests))
        for name, digest in digests.items():
            if self.others.get(name, digest) != digest:
                raise AlreadyExists("other documents", metadata={"node_id": "node-b", "digest": self.others[name]})


@contextlib.asynccontextmanager
async def reporting(tmp_path, registry):
    """Yields a store whose corpora are reported."""
    reports = CorpusReports(registry, epoch=lambda: 3, held=lambda: store.digests())  # noqa: PLW0108 - made below.
    store = CorpusStore(tmp_path / "corpora", register=reports)
    task = asyncio.create_task(reports.run())
    yield store
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until_reported(registry, digests):
    async with asyncio.timeout(20):
        while not registry.whole or registry.whole[-1] != (3, digests):  # noqa: ASYNC110 - a fake tells nobody.
            await asyncio.sleep(0.02)


async def test_a_corpus_is_asked_for_and_then_reported(tmp_path):
    registry = FakeCorpusRegistry()
    async with reporting(tmp_path, registry) as store:
        corpus = await asyncio.to_thread(store.ingest_tokens, "a", [[1, 2], [3]])
        again = await asyncio.to_thread(store.ingest_tokens, "a", [[1, 2], [3]])
        await until_reported(registry, {"a": corpus.digest})
        await asyncio.to_thread(store.delete, "a")
        await until_reported(registry, {})

    assert again == corpus
    assert registry.asked == [{"a": corpus.digest}]


async def test_other_documents_under_an_id_of_another_node_are_not_kept(tmp_path):
    registry = FakeCorpusRegistry()
    registry.others["a"] = "f" * 64
    async with reporting(tmp_path, registry) as store:
        with pytest.raises(AlreadyExists) as refused:
            await asyncio.to_thread(store.ingest_tokens, "a", [[1, 2]])
        with pytest.raises(CorpusNotFound):
            store.get("a")

    assert refused.value.metadata == {"node_id": "node-b", "digest": "f" * 64}
    assert store.digests() == {}
    assert [entry.name for entry in (tmp_path / "corpora").iterdir()] == []


def test_a_claim_outlives_another_ingest_of_its_id(tmp_path):
    class Register:
        """Refuses the second claim, which is made while the first one is asked for."""

        def claim(self, corpus):
            asked.append(corpus)
            if len(asked) > 1:
                raise AlreadyExists("other documents")
            with pytest.raises(AlreadyExists):
                store.ingest_tokens("a", [[3, 4]])
            held.update(store.digests())

        def changed(self):
            pass

    asked, held = [], {}
    store = CorpusStore(tmp_path, register=Register())
    corpus = store.ingest_tokens("a", [[1, 2]])

    assert held == {"a": corpus.digest}
    assert len(asked) == 2


async def test_an_ingest_waits_for_a_registry_that_is_away_for_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_reports, "_RETRY_S", 0.05)
    registry = FakeCorpusRegistry()
    registry.away = True
    async with reporting(tmp_path, registry) as store:
        ingest = asyncio.create_task(asyncio.to_thread(store.ingest_tokens, "a", [[1, 2]]))
        await asyncio.sleep(0.3)
        assert not ingest.done()
        registry.away = False
        corpus = await ingest

    assert registry.asked == [{"a": corpus.digest}]


async def test_an_ingest_is_given_up_while_the_registry_stays_away(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_reports, "_CLAIM_DEADLINE_S", 0.2)
    monkeypatch.setattr(corpus_reports, "_RETRY_S", 0.05)
    registry = FakeCorpusRegistry()
    registry.away = True
    started = time.monotonic()
    async with reporting(tmp_path, registry) as store:
        with pytest.raises(RegistryUnavailable):
            await asyncio.to_thread(store.ingest_tokens, "a", [[1, 2]])

    assert time.monotonic() - started < 5
    assert store.digests() == {}


async def test_a_change_before_the_first_registration_leaves_the_loop_free(monkeypatch):
    monkeypatch.setattr(corpus_reports, "_RETRY_S", 0.05)
    registry, n_looks, epoch = FakeCorpusRegistry(), 0, 0

    def look():
        nonlocal n_looks
        n_looks += 1
        assert n_looks < 1000, "the loop never gives way"
        return epoch

    reports = CorpusReports(registry, epoch=look, held=lambda: {"a": "f" * 64})
    task = asyncio.create_task(reports.run())
    reports.changed()
    await asyncio.sleep(0.2)
    epoch = 3
    await until_reported(registry, {"a": "f" * 64})
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert n_looks < 10


async def test_a_second_content_under_one_id_is_refused_by_a_real_registry(registry, tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        stores = []
        for name in ("node-a", "node-b"):
            who = {"node_id": name, "version": "test", "boot_nonce": name}
            client = RegistryClient([registry.address], credentials=Credentials(), **who)
            stack.push_async_callback(client.close)
            device = Device(id="cpu", kind="cpu", name="test", capacity_bytes=1, free_bytes=1)
            epoch, _ = await client.register("127.0.0.1:1", (device,), Machine())
            reports = CorpusReports(client, epoch=lambda epoch=epoch: epoch, held=dict)
            stores.append(CorpusStore(tmp_path / name, register=reports))
        first, second = stores
        corpus = await asyncio.to_thread(first.ingest_tokens, "docs", [[1, 2]])
        same = await asyncio.to_thread(second.ingest_tokens, "docs", [[1, 2]])
        await asyncio.to_thread(second.delete, "docs")
        with pytest.raises(AlreadyExists) as refused:
            await asyncio.to_thread(second.ingest_tokens, "docs", [[3, 4]])

    assert same.digest == corpus.digest
    assert refused.value.metadata == {"node_id": "node-a", "digest": corpus.digest}
    assert second.digests() == {}
