"""A repeated call about a corpus after a lost answer gets the first answer again."""

from __future__ import annotations

import uuid

import pytest

from headrace.extractor.v1 import corpus_service_pb2 as pb
from headrace_chassis.shutdown import Shutdown
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import AlreadyExists, CorpusNotFound, FieldInvalid, StateConflict
from headrace_extractor.hub.client import HubDatasets
from headrace_extractor.requests import Requests
from headrace_extractor.rpc.corpus_servicer import CorpusServicer


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data" / "notes.txt"
    path.parent.mkdir()
    path.write_text("one\n\ntwo")
    return path


@pytest.fixture
def in_use():
    return set()


@pytest.fixture
def service(tmp_path, file, in_use):
    store = CorpusStore(tmp_path / "corpora", allowed_roots=[file.parent])
    return CorpusServicer(store, HubDatasets({}), in_use=in_use.__contains__, shutdown=Shutdown())


def registration(file, request_id):
    spec = pb.CorpusSpec(id="notes", file_name=file.name)
    return pb.RegisterCorpusRequest(request_id=request_id, spec=spec, path=pb.PathSource(path=str(file)))


def deletion(request_id):
    return pb.DeleteCorpusRequest(request_id=request_id, corpus_id="notes")


def new_id():
    return str(uuid.uuid4())


async def test_repeated_deletion_is_no_error_and_deletes_no_later_corpus(service, file, in_use):
    request = deletion(new_id())
    await service.RegisterCorpus(registration(file, new_id()), None)
    await service.DeleteCorpus(request, None)
    await service.DeleteCorpus(request, None)
    with pytest.raises(CorpusNotFound):
        await service.DeleteCorpus(deletion(new_id()), None)
    await service.RegisterCorpus(registration(file, new_id()), None)
    in_use.add("notes")
    await service.DeleteCorpus(request, None)

    assert (await service.GetCorpus(pb.GetCorpusRequest(corpus_id="notes"), None)).corpus.n_documents == 2
    with pytest.raises(StateConflict):
        await service.DeleteCorpus(deletion(new_id()), None)


async def test_repeated_registration_answers_with_the_first_corpus_though_the_file_has_changed(service, file):
    request = registration(file, new_id())
    first = await service.RegisterCorpus(request, None)
    file.write_text("three")
    again = await service.RegisterCorpus(request, None)

    assert again == first
    with pytest.raises(AlreadyExists):
        await service.RegisterCorpus(registration(file, new_id()), None)


async def test_calls_without_a_request_id_are_never_taken_for_repeated(service, file):
    await service.RegisterCorpus(registration(file, ""), None)
    file.write_text("three")
    with pytest.raises(AlreadyExists):
        await service.RegisterCorpus(registration(file, ""), None)
    await service.DeleteCorpus(deletion(""), None)
    with pytest.raises(CorpusNotFound):
        await service.DeleteCorpus(deletion(""), None)


async def test_request_id_that_is_no_uuid_is_refused(service, file):
    for call, request in ((service.RegisterCorpus, registration(file, "1")), (service.DeleteCorpus, deletion("1"))):
        with pytest.raises(FieldInvalid) as caught:
            await call(request, None)
        assert caught.value.field == "request_id"


def test_only_the_latest_requests_are_remembered():
    requests = Requests(limit=2)
    for number in "123":
        requests.remember(number, f"resource {number}")

    assert [requests.recall(number) for number in "123"] == [None, "resource 2", "resource 3"]
