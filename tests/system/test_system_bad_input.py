"""Bad input to the real services: the right code and reason, services alive afterwards, nothing lost."""

from __future__ import annotations

import uuid

import grpc
import pytest
from grpc import StatusCode

from fix_postgres import refusal_of
from fix_system import FAST, HOOKPOINT, MODEL, PATIENCE_S, TOKEN, read, texts
from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace.extractor.v1 import corpus_service_pb2_grpc as corpora_grpc
from headrace.extractor.v1 import extraction_pb2 as extraction_pb
from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc
from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import model_service_pb2_grpc as models_grpc
from headrace.registry.v1 import residency_service_pb2 as residencies_pb
from headrace.registry.v1 import residency_service_pb2_grpc as residencies_grpc
from headrace_client import errors
from headrace_client.values import ExtractionState, Recipe

pytestmark = pytest.mark.timeout(240)

MIB = 1024 * 1024


class Stubs:
    """The generated stubs of both servers, with the token or another one."""

    def __init__(self, system, token=TOKEN):
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channels = [
            grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)])
            for address in (system.registry.address, system.extractor.address)
        ]
        registry, extractor = self._channels
        self.models = models_grpc.ModelServiceStub(registry)
        self.residencies = residencies_grpc.ResidencyServiceStub(registry)
        self.corpora = corpora_grpc.CorpusServiceStub(extractor)
        self.extractions = service_grpc.ExtractionServiceStub(extractor)

    def refused(self, method, request):
        """Makes a call that must fail; returns its code, reason and details."""
        with pytest.raises(grpc.RpcError) as caught:
            answer = method(request, timeout=60, metadata=self.metadata)
            for _ in answer if hasattr(answer, "__next__") else ():
                pass
        return refusal_of(caught.value)

    def close(self):
        for channel in self._channels:
            channel.close()


@pytest.fixture(scope="module")
def stubs(system):
    stubs = Stubs(system)
    yield stubs
    stubs.close()


@pytest.fixture(scope="module", autouse=True)
def docs(system):
    system.client.corpora.upload("docs", documents=texts(30, seed=4))


@pytest.fixture(autouse=True)
def alive_afterwards(system):
    """After every test, both services still do their work."""
    before = system.registry.pid, system.extractor.pid
    yield
    assert (system.registry.pid, system.extractor.pid) == before
    assert system.registry.running
    assert system.extractor.running
    extraction = system.client.extractions.start(MODEL, "docs", HOOKPOINT, recipe=FAST)
    assert system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S).n_rows > 30
    bugs = [
        line
        for process in (system.registry, system.extractor)
        for line in process.log_lines()
        if line["level"] == "error" or line.get("reason") == "INTERNAL"
    ]
    assert not bugs


def start_request(**changes):
    spec = {"model_id": MODEL, "corpus_id": "docs", "hookpoints": [HOOKPOINT]} | changes
    return service_pb.StartExtractionRequest(request_id=str(uuid.uuid4()), spec=extraction_pb.ExtractionSpec(**spec))


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("blocks.2.hook_resid_pots", "blocks.2.hook_resid_post"),
        ("blocks.1.hook_mpl_out", "blocks.1.hook_mlp_out"),
        ("blocks.4.hook_resid_post", "blocks.3.hook_resid_post"),
        ("blocks.99.hook_attn_out", "blocks.3.hook_attn_out"),
    ],
)
def test_an_unknown_hookpoint_is_refused_with_the_nearest_names(stubs, asked, nearest):
    refusal = stubs.refused(stubs.extractions.StartExtraction, start_request(hookpoints=[HOOKPOINT, asked]))

    assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "HOOKPOINT_NOT_FOUND")
    assert refusal.metadata["nearest"].split(",")[0] == nearest
    assert nearest in refusal.message


@pytest.mark.parametrize("asked", ["blocks.4.hook_resid_post", "blocks.-5.hook_resid_post"])
def test_a_layer_out_of_range_is_refused_with_the_range(stubs, asked):
    refusal = stubs.refused(stubs.extractions.StartExtraction, start_request(hookpoints=[asked]))

    assert (refusal.code, refusal.reason) == (StatusCode.NOT_FOUND, "HOOKPOINT_NOT_FOUND")
    assert refusal.metadata["n_layers"] == "4"
    assert "0 to 3" in refusal.message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hookpoints": []}, "spec.hookpoints"),
        ({"model_id": ""}, "spec.model_id"),
        ({"max_rows": -1}, "spec.max_rows"),
        ({"recipe": extraction_pb.Recipe(context_size=1)}, "spec.recipe.context_size"),
        ({"recipe": extraction_pb.Recipe(context_size=4096)}, "spec.recipe.context_size"),
        ({"recipe": extraction_pb.Recipe(batch_size=5000)}, "spec.recipe.batch_size"),
    ],
)
def test_a_field_out_of_range_is_named(stubs, changes, field):
    refusal = stubs.refused(stubs.extractions.StartExtraction, start_request(**changes))

    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refusal.fields == (field,)


def test_an_unknown_model_is_not_found_by_either_service(stubs):
    acquire = residencies_pb.AcquireLeaseRequest(request_id=str(uuid.uuid4()), model_id="nobody", holder="a test")
    refusals = [
        stubs.refused(stubs.models.GetModel, models_pb.GetModelRequest(model_id="nobody")),
        stubs.refused(stubs.models.PrepareModel, models_pb.PrepareModelRequest(model_id="nobody")),
        stubs.refused(stubs.residencies.AcquireLease, acquire),
        stubs.refused(stubs.extractions.StartExtraction, start_request(model_id="nobody")),
        stubs.refused(stubs.extractions.ListHookpoints, service_pb.ListHookpointsRequest(model_id="nobody")),
    ]

    assert {(each.code, each.reason) for each in refusals} == {(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")}


def test_unknown_corpora_and_extractions_are_not_found(stubs):
    corpus = stubs.refused(stubs.extractions.StartExtraction, start_request(corpus_id="nobody"))
    stream = service_pb.StreamActivationsRequest(extraction_id="xnobody")
    extraction = stubs.refused(stubs.extractions.StreamActivations, stream)

    assert (corpus.code, corpus.reason) == (StatusCode.NOT_FOUND, "CORPUS_NOT_FOUND")
    assert (extraction.code, extraction.reason) == (StatusCode.NOT_FOUND, "EXTRACTION_NOT_FOUND")


def upload(file_name, content, corpus_id="broken"):
    yield corpora_pb.UploadCorpusRequest(spec=corpora_pb.CorpusSpec(id=corpus_id, file_name=file_name))
    yield corpora_pb.UploadCorpusRequest(content=content)


@pytest.mark.parametrize(
    ("file_name", "content"),
    [("a.txt", b""), ("a.txt", b"\n \n\n"), ("a.jsonl", b"\n"), ("a.jsonl", b'{"text": ""}\n'), ("a.csv", b"text\n")],
)
def test_an_empty_corpus_is_refused_and_leaves_nothing(system, stubs, file_name, content):
    refusal = stubs.refused(stubs.corpora.UploadCorpus, upload(file_name, content))

    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "CORPUS_EMPTY")
    assert "broken" not in {corpus.id for corpus in system.client.corpora.list()}


def test_a_corpus_of_which_no_row_survives_ends_the_extraction(system):
    recipe = Recipe(context_size=32, packing="one_document", drop_first_positions=31)
    system.client.corpora.upload("one-byte", documents=["a"])
    extraction = system.client.extractions.start(MODEL, "one-byte", HOOKPOINT, recipe=recipe)

    with pytest.raises(errors.CorpusEmpty):
        system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)
    with pytest.raises(errors.CorpusEmpty):
        read(system.client, extraction)


@pytest.mark.parametrize(
    ("file_name", "content", "line"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n{"text": "three"}\n', "2"),
        ("a.jsonl", b'{"text": "one"}\n\n{"txt": "two"}\n', "3"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', "2"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "2"),
        ("a.csv", b"text\none\ntwo,too many\n", "3"),
    ],
)
def test_a_malformed_corpus_is_refused_with_its_line_and_leaves_nothing(system, stubs, file_name, content, line):
    refusal = stubs.refused(stubs.corpora.UploadCorpus, upload(file_name, content))

    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "CORPUS_MALFORMED")
    assert refusal.metadata["line"] == line
    assert "broken" not in {corpus.id for corpus in system.client.corpora.list()}


def test_an_upload_that_breaks_off_leaves_nothing(system, stubs):
    def torn():
        yield from upload("a.jsonl", b'{"text": "one"}\n', "torn")
        raise OSError("the cable")

    with pytest.raises(grpc.RpcError):
        stubs.corpora.UploadCorpus(torn(), timeout=60, metadata=stubs.metadata)

    with pytest.raises(errors.CorpusNotFound):
        system.client.corpora.get("torn")


def test_paths_outside_the_roots_are_refused_by_either_service(system, stubs, tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("not for everyone")
    link = system.corpus_root / "link.txt"
    link.symlink_to(outside)
    paths = [str(outside), f"{system.corpus_root}/../secret.txt", str(link), "/etc/passwd"]

    for path in paths:
        spec = corpora_pb.CorpusSpec(id="outside", file_name="a.txt")
        request = corpora_pb.RegisterCorpusRequest(spec=spec, path=corpora_pb.PathSource(path=path))
        refusal = stubs.refused(stubs.corpora.RegisterCorpus, request)
        assert (refusal.code, refusal.reason) == (StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED"), path
        source = model_pb.ModelSource(folder=model_pb.FolderSource(path=str(tmp_path)))
        register = models_pb.RegisterModelRequest(model=model_pb.Model(id="outside", source=source))
        refusal = stubs.refused(stubs.models.RegisterModel, register)
        assert (refusal.code, refusal.reason) == (StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED")


def test_a_path_under_the_root_is_taken(system):
    (system.corpus_root / "inside.txt").write_text("One paragraph.\n\nAnother one.\n")

    assert system.client.corpora.register_path("inside", system.corpus_root / "inside.txt").n_documents == 2


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
def test_a_wrong_token_is_refused_by_either_service(system, token):
    stubs = Stubs(system, token)
    calls = [
        (stubs.models.ListModels, models_pb.ListModelsRequest()),
        (stubs.residencies.WatchResidencies, residencies_pb.WatchResidenciesRequest()),
        (stubs.extractions.ListExtractions, service_pb.ListExtractionsRequest()),
        (stubs.extractions.StreamActivations, service_pb.StreamActivationsRequest(extraction_id="x")),
        (stubs.corpora.UploadCorpus, upload("a.txt", b"text")),
    ]

    refusals = [stubs.refused(method, request) for method, request in calls]
    stubs.close()

    assert {(each.code, each.reason) for each in refusals} == {(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")}


@pytest.mark.parametrize("size", [5 * MIB, 15 * MIB])
def test_an_oversized_message_is_refused_by_either_service(stubs, size):
    documents = [corpora_pb.TokenDocument(token_ids=[100_000] * 1000)] * (size // 3000)
    tokens = corpora_pb.TokenIdsSource(documents=documents)
    corpus = corpora_pb.RegisterCorpusRequest(spec=corpora_pb.CorpusSpec(id="large"), token_ids=tokens)
    listing = models_pb.ListModelsRequest(filter="x" * size)

    refusals = [
        stubs.refused(stubs.corpora.RegisterCorpus, corpus),
        stubs.refused(stubs.corpora.UploadCorpus, upload("a.txt", b"x" * size)),
        stubs.refused(stubs.models.ListModels, listing),
    ]

    assert {(each.code, each.reason) for each in refusals} == {(StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")}


def test_a_message_too_large_to_be_read_at_all_is_typed_in_the_client(system):
    with pytest.raises(errors.MessageTooLarge):
        system.client.corpora.register_token_ids("huge", [[100_000] * 1000] * 7000)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"chunk_bytes": 5 * MIB}, "chunk_bytes"),
        ({"start_row": -1}, "start_row"),
        ({"start_row": 5, "end_row": 4}, "end_row"),
        ({"columns": [HOOKPOINT, HOOKPOINT]}, "columns"),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(system, stubs, changes, field):
    extraction = system.client.extractions.start(MODEL, "docs", HOOKPOINT, recipe=FAST)
    request = service_pb.StreamActivationsRequest(extraction_id=extraction.id, **changes)

    refusal = stubs.refused(stubs.extractions.StreamActivations, request)

    assert (refusal.code, refusal.reason) == (StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refusal.fields == (field,)


def test_rows_beyond_the_end_are_out_of_range(system, stubs):
    extraction = system.client.extractions.start(MODEL, "docs", HOOKPOINT, recipe=FAST)
    n_rows = system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S).n_rows
    request = service_pb.StreamActivationsRequest(extraction_id=extraction.id, start_row=n_rows + 1)

    refusal = stubs.refused(stubs.extractions.StreamActivations, request)

    assert (refusal.code, refusal.reason) == (StatusCode.OUT_OF_RANGE, "ROWS_EXPIRED")
    assert refusal.metadata["n_rows"] == str(n_rows)


def test_a_cancelled_extraction_says_so_to_its_reader(system, stubs):
    extraction = system.client.extractions.start(MODEL, system.variant(texts(3000)), HOOKPOINT)
    system.client.extractions.cancel(extraction.id)
    request = service_pb.StreamActivationsRequest(extraction_id=extraction.id)

    refusal = stubs.refused(stubs.extractions.StreamActivations, request)

    assert (refusal.code, refusal.reason) == (StatusCode.CANCELLED, "EXTRACTION_CANCELLED")
    assert system.client.extractions.get(extraction.id).state is ExtractionState.CANCELLED
