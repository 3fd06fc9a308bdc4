"""Datasets of the hub through `datasets` itself, against a hub that speaks the same HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fix_hub_datasets import DATASET_SHA, REPO
from headrace.extractor.v1 import corpus_service_pb2 as pb
from headrace_chassis.errors import ShuttingDown
from headrace_chassis.shutdown import Shutdown
from headrace_extractor import errors
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.hub import client
from headrace_extractor.hub.client import HubDatasets
from headrace_extractor.hub.job import HubJob
from headrace_extractor.rpc.corpus_servicer import CorpusServicer

pytest.importorskip("datasets")


def lines(n, **more) -> bytes:
    return b"".join(json.dumps({"text": f"document {i}", "n": i, **more}).encode() + b"\n" for i in range(n))


def parquet(columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=50)
    return file.getvalue()


def read(hub, *, silence_s=40.0, check=lambda: None, **job):
    settings = {"repo_id": REPO, "backoff_s": 0.01} | job
    with HubDatasets(hub.environment, silence_s=silence_s).open(HubJob(**settings), check) as dataset:
        return dataset.origin, list(dataset.documents())


def test_a_dataset_is_read_at_the_commit_its_revision_stands_for(dataset_hub):
    dataset_hub.add("train.jsonl", lines(30))

    origin, documents = read(dataset_hub, revision="main", max_documents=25)

    assert documents == [f"document {i}".encode() for i in range(25)]
    assert origin == f"hub:{REPO}@{DATASET_SHA} text first 25"
    assert not [path for _, path, _ in dataset_hub.seen if "/resolve/main/" in path]


@pytest.mark.slow
def test_splits_configurations_and_columns_are_chosen(dataset_hub):
    card = """---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/train.parquet}
  - {split: test, path: one/test.parquet}
- config_name: two
  data_files: two.parquet
---
"""
    dataset_hub.add("README.md", card.encode())
    dataset_hub.add("one/train.parquet", parquet({"body": ["a"], "ids": [[1]]}))
    dataset_hub.add("one/test.parquet", parquet({"body": ["b", "c"], "ids": [[5, 6], [7]]}))
    talk = [{"role": "user", "content": "hi"}]
    dataset_hub.add("two.parquet", parquet({"messages": [talk]}))

    assert read(dataset_hub, config="one", split="test", column="body")[1] == [b"b", b"c"]
    tokens = read(dataset_hub, config="one", split="test", column="ids", kind="tokens")[1]
    assert tokens == [b"\x05\0\0\0\x06\0\0\0", b"\x07\0\0\0"]
    assert [json.loads(each) for each in read(dataset_hub, config="two", column="messages", kind="chat")[1]] == [talk]
    with pytest.raises(errors.FieldInvalid, match="train, test") as caught:
        read(dataset_hub, config="one", column="body")
    assert caught.value.field == "hub.split"
    with pytest.raises(errors.FieldInvalid, match="'one', 'two'") as caught:
        read(dataset_hub, column="body")
    assert caught.value.field == "hub.config"


@pytest.mark.slow
def test_what_can_not_become_documents_is_malformed(dataset_hub):
    dataset_hub.add("train.jsonl", lines(2))

    with pytest.raises(errors.CorpusMalformed) as caught:
        read(dataset_hub, column="body")
    assert caught.value.metadata["columns"] == "text, n"
    with pytest.raises(errors.CorpusMalformed, match="number") as caught:
        read(dataset_hub, column="n")
    assert caught.value.metadata["row"] == "0"
    dataset_hub.add("train.jsonl", b'{"text": "fine"}\n{"text"')
    with pytest.raises(errors.CorpusMalformed, match="can't be read"):
        read(dataset_hub)


@pytest.mark.slow
def test_a_dataset_of_other_things_or_of_files_elsewhere_is_refused(dataset_hub, tmp_path):
    dataset_hub.add("a.png", b"no image")
    with pytest.raises(errors.CorpusMalformed, match="parquet, json"):
        read(dataset_hub)
    (tmp_path / "secret.txt").write_text("secret")
    (dataset_hub.folder / "a.png").unlink()
    dataset_hub.add("b.txt", b"text")
    dataset_hub.add(
        "README.md", f"---\nconfigs:\n- data_files: {tmp_path}/secret.txt\n  config_name: a\n---\n".encode()
    )
    with pytest.raises(errors.CorpusMalformed, match="relative paths"):
        read(dataset_hub)


def test_a_private_dataset_needs_its_token_which_appears_nowhere(dataset_hub, caplog):
    dataset_hub.token = "hf_secret"
    dataset_hub.add("train.jsonl", lines(3))
    caplog.set_level(logging.DEBUG)

    origin, documents = read(dataset_hub, token="hf_secret")

    assert len(documents) == 3
    assert "hf_secret" not in origin + caplog.text + repr(HubJob(repo_id=REPO, token="hf_secret"))
    assert {authorization for *_, authorization in dataset_hub.seen} == {"Bearer hf_secret"}
    with pytest.raises(errors.HubNotFound, match="hides it"):
        read(dataset_hub)


@pytest.mark.slow
def test_gated_and_unknown_datasets_say_what_to_do(dataset_hub):
    dataset_hub.add("train.jsonl", lines(3))
    with pytest.raises(errors.HubNotFound, match="spelling"):
        read(dataset_hub, repo_id="owner/other")
    with pytest.raises(errors.HubNotFound):
        read(dataset_hub, revision="v2")
    dataset_hub.gated = True
    with pytest.raises(errors.HubGated, match="accept its terms"):
        read(dataset_hub)


@pytest.mark.slow
def test_a_hub_that_is_down_is_unavailable_after_three_tries(dataset_hub):
    dataset_hub.fail_status = 503

    with pytest.raises(errors.HubUnavailable) as caught:
        read(dataset_hub)
    assert caught.value.retry_after_s == 30
    assert len(dataset_hub.seen) >= 3


def test_a_hub_without_the_package_names_the_extra(dataset_hub, monkeypatch):
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(errors.ExtraMissing, match=r"headrace\[datasets\]") as caught:
        read(dataset_hub)
    assert caught.value.metadata == {"extra": "datasets"}


@pytest.mark.slow
def test_who_stops_waiting_ends_the_process(dataset_hub):
    dataset_hub.add("train.jsonl", lines(20_000))
    dataset_hub.stall.set()
    stop = threading.Event()

    def check():
        if stop.is_set():
            raise ShuttingDown

    threading.Timer(4.0, stop.set).start()
    began = time.monotonic()
    with pytest.raises(ShuttingDown):
        read(dataset_hub, check=check)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_hub_that_goes_silent_is_given_up(dataset_hub):
    dataset_hub.add("train.jsonl", lines(20_000))
    dataset_hub.stall.set()

    with pytest.raises(errors.HubUnavailable, match="broke off"):
        read(dataset_hub, silence_s=5.0)


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [1, 3])
def test_cut_connections_lose_and_repeat_nothing(dataset_hub, cuts):
    dataset_hub.add("train.parquet", parquet({"text": [f"document {i}" for i in range(500)]}))
    dataset_hub.n_cuts = cuts

    assert read(dataset_hub)[1] == [f"document {i}".encode() for i in range(500)]
    assert dataset_hub.n_cuts == 0


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ({"repo_id": "words"}, "repo_id"),
        ({"repo_id": "../etc/passwd"}, "repo_id"),
        ({"repo_id": "/etc"}, "repo_id"),
        ({"repo_id": "a/b/c"}, "repo_id"),
        ({"repo_id": "http://host/x"}, "repo_id"),
        ({"max_documents": -1}, "max_documents"),
        ({"revision": "x" * 300}, "revision"),
        ({"split": "a\nb"}, "split"),
    ],
)
def test_a_job_out_of_range_names_its_field(job, field):
    with pytest.raises(errors.FieldInvalid) as caught:
        HubJob(**{"repo_id": REPO} | job)
    assert caught.value.field == f"hub.{field}"


def servicer(hub, tmp_path):
    store = CorpusStore(tmp_path / "corpora")
    return store, CorpusServicer(store, HubDatasets(hub.environment), in_use=lambda _: False, shutdown=Shutdown())


def request(**changes):
    source = pb.HubDatasetSource(repo_id=REPO, **changes)
    return pb.RegisterCorpusRequest(spec=pb.CorpusSpec(id="words"), hub=source)


async def test_a_dataset_becomes_a_corpus_that_a_second_call_finds(dataset_hub, tmp_path):
    dataset_hub.add("train.jsonl", lines(40))
    store, service = servicer(dataset_hub, tmp_path)

    corpus = (await service.RegisterCorpus(request(hub_token="hf_secret"), None)).corpus
    n_files = sum("train.jsonl" in path for _, path, _ in dataset_hub.seen)
    again = (await service.RegisterCorpus(request(), None)).corpus

    assert (corpus.n_documents, corpus.origin) == (40, f"hub:{REPO}@{DATASET_SHA} text")
    assert again == corpus
    assert (
        sum("train.jsonl" in path for _, path, _ in dataset_hub.seen) - n_files <= 1
    )  # The child may have read ahead.
    assert b"hf_secret" not in b"".join(path.read_bytes() for path in store._root.rglob("*") if path.is_file())


@pytest.mark.slow
async def test_a_call_that_is_given_up_ends_its_process_and_keeps_nothing(dataset_hub, tmp_path):
    dataset_hub.add("train.jsonl", lines(20_000))
    dataset_hub.stall.set()
    store, service = servicer(dataset_hub, tmp_path)
    call = asyncio.create_task(service.RegisterCorpus(request(), None))
    async with asyncio.timeout(30):
        while not any("train.jsonl" in path for _, path, _ in dataset_hub.seen):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        children = {child.pid for child in psutil.Process().children()}
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while any(child.pid in children for child in psutil.Process().children()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    assert list(store._root.iterdir()) == []
