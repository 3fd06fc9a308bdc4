"""Resources of the client against scripted servers: requests, results and errors."""

import subprocess
import sys
import time

import grpc
import pytest

from fix_scripted import unavailable
from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, SECOND, Fault, ScriptedExtractor
from fix_scripted_registry import ScriptedRegistry
from headrace.common.v1 import error_reason_pb2
from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace_client import HeadraceClient, ModelState, Packing, Recipe, Window, errors


def test_every_reason_of_the_contract_has_its_class():
    reasons = {name.removeprefix("ERROR_REASON_") for name, _ in error_reason_pb2.ErrorReason.items()} - {"UNSPECIFIED"}

    assert reasons <= errors.BY_REASON.keys()


def test_every_code_has_a_class_and_every_class_one_reason():
    codes = {code.name for code in grpc.StatusCode} - {"OK", "UNKNOWN"}

    assert codes == errors.BY_CODE.keys()
    kinds = list(errors._walk(errors.HeadraceError))
    assert len({kind.REASON for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("reason", sorted(set(error_reason_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}))
def test_a_reason_arrives_as_its_class(client, scripted_registry, reason):
    name = reason.removeprefix("ERROR_REASON_")
    kind = errors.BY_REASON[name]
    scripted_registry.fail["GetModel"].append(
        {"code": grpc.StatusCode.FAILED_PRECONDITION, "reason": name, "message": "m", "metadata": {"a": "b"}}
    )

    with pytest.raises(kind) as caught:
        client.models.get("x")

    assert (caught.value.reason, caught.value.message, caught.value.metadata) == (name, "m", {"a": "b"})


def test_an_unknown_reason_falls_back_to_its_code(client, scripted_registry):
    scripted_registry.fail["GetModel"].append({"code": grpc.StatusCode.NOT_FOUND, "reason": "FROM_THE_FUTURE"})

    with pytest.raises(errors.NotFound) as caught:
        client.models.get("x")

    assert caught.value.reason == "FROM_THE_FUTURE"


def test_retry_delay_and_fields_arrive(client, scripted_registry):
    scripted_registry.fail["GetModel"].extend(
        [
            {"code": grpc.StatusCode.RESOURCE_EXHAUSTED, "reason": "CAPACITY_BUSY", "retry_after_s": 1.5},
            {"code": grpc.StatusCode.INVALID_ARGUMENT, "reason": "FIELD_INVALID", "fields": {"model_id": "empty"}},
        ]
    )

    with pytest.raises(errors.CapacityBusy) as busy:
        client.models.get("x")
    with pytest.raises(errors.InvalidArgument) as invalid:
        client.models.get("")

    assert busy.value.retry_after_s == 1.5
    assert invalid.value.fields == {"model_id": "empty"}


def test_an_oversize_message_names_the_remedy(client):
    with pytest.raises(errors.MessageTooLarge) as caught:
        client.corpora.register_token_ids("huge", [[100_000] * 2_000_000])

    assert "upload a file" in caught.value.remedy


def test_a_mutation_is_repeated_under_one_request_id(client, scripted_registry):
    scripted_registry.fail["RegisterModel"].extend([unavailable("DATABASE_UNAVAILABLE"), unavailable("")])

    model = client.models.register(hub="a/b", id="tiny")

    assert model.id == "tiny"
    sent = scripted_registry.calls["RegisterModel"]
    assert len(sent) == 3
    assert len({call.request_id for call in sent}) == 1


def test_a_call_has_a_deadline(registry_host, scripted_registry):
    scripted_registry.hang.add("GetModel")

    hasty = HeadraceClient.connect(registry_host.address, deadline_s=0.2)
    with hasty as client, pytest.raises(errors.DeadlineExceeded):
        client.models.get("x")


def test_a_server_that_is_not_there_is_unavailable():
    with HeadraceClient.connect("127.0.0.1:1", deadline_s=5) as client, pytest.raises(errors.Unavailable) as caught:
        client.models.get("x")

    assert "127.0.0.1:1" in caught.value.message
    assert "headrace up" in caught.value.remedy


def test_a_closed_client_says_so(registry_host):
    client = HeadraceClient.connect(registry_host.address)
    client.close()

    with pytest.raises(errors.Cancelled, match="closed"):
        client.models.get("x")


def test_a_closed_client_does_not_connect_again(registry_host):
    client = HeadraceClient.connect(registry_host.address)
    client.extractions.get(EXTRACTION_ID)  # Now it knows the extraction's node.
    client.close()

    with pytest.raises(errors.Cancelled, match="closed") as caught:
        client.extractions.get(EXTRACTION_ID)

    assert (caught.value.reason, caught.value.remedy) == ("CLIENT_CLOSED", "connect a new one")


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:99999", "http://x"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(errors.InvalidArgument):
        HeadraceClient.connect(address)


def test_the_token_goes_with_every_call(registry_host, scripted_registry, scripted_extractor):
    with HeadraceClient.connect(registry_host.address, token="secret") as client:
        list(client.models.list())
        list(client.extractions.watch(EXTRACTION_ID))
        with client.chunks(EXTRACTION_ID) as stream:
            next(stream)

    seen = [scripted_registry.metadata["ListModels"][0], scripted_extractor.metadata["WatchExtraction"][0]]
    seen.append(scripted_extractor.metadata["StreamActivations"][0])
    assert {one["authorization"] for one in seen} == {"Bearer secret"}


def test_models_are_registered_from_each_kind_of_source(client, scripted_registry):
    client.models.register(hub="a/b", revision="main", id="m1", quantization="int8", labels={"team": "x"})
    client.models.register(folder="/models/f", id="m2", load_options={"dtype": "bfloat16"})
    client.models.register(gguf="/models/m.gguf", id="m3")

    sources = [call.model.source for call in scripted_registry.calls["RegisterModel"]]
    assert sources[0].hub == model_pb.HubSource(repo_id="a/b", revision="main")
    assert (sources[1].folder.path, sources[2].gguf.path) == ("/models/f", "/models/m.gguf")
    model = client.models.get("m1")
    assert (model.quantization, model.labels, model.state) == ("int8", {"team": "x"}, ModelState.REGISTERED)
    assert client.models.get("m2").load_options == {"dtype": "bfloat16"}


@pytest.mark.parametrize("sources", [{}, {"hub": "a/b", "folder": "/x"}])
def test_a_model_has_exactly_one_source(client, sources):
    with pytest.raises(errors.InvalidArgument):
        client.models.register(**sources)


def test_lists_iterate_over_all_pages(client, scripted_registry):
    for at in range(5):
        client.models.register(hub="a/b", id=f"m{at}")

    assert [model.id for model in client.models.list()] == [f"m{at}" for at in range(5)]
    assert len(scripted_registry.calls["ListModels"]) == 3


def test_wait_ready_tells_progress_and_survives_a_cut(client, scripted_registry):
    client.models.register(hub="a/b", id="tiny")
    scripted_registry.cut_watch_at = {1, 2}
    seen = []

    model = client.models.wait_ready("tiny", on_progress=seen.append, deadline_s=10)

    assert model.state is ModelState.READY
    assert [one.state for one in seen] == ["DOWNLOADING", "DOWNLOADING", "READY"]
    assert [call.after_seq for call in scripted_registry.calls["WatchModel"]] == [0, 1, 2]


def test_wait_ready_raises_the_failure(client, scripted_registry):
    client.models.register(hub="a/b", id="tiny")
    scripted_registry.script = ["DOWNLOADING", "FAILED"]

    with pytest.raises(errors.HubGated, match="accept the terms"):
        client.models.wait_ready("tiny", deadline_s=10)


def test_wait_ready_has_a_deadline(client, scripted_registry):
    client.models.register(hub="a/b", id="tiny")
    scripted_registry.script = ["DOWNLOADING"]

    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        client.models.wait_ready("tiny", deadline_s=0.4)

    assert time.monotonic() - began < 5


def test_watching_an_unknown_model_is_refused_at_once(client):
    with pytest.raises(errors.ModelNotFound):
        next(client.models.watch("nope"))


def test_a_state_from_the_future_is_unknown(client, scripted_registry):
    model = client.models.register(hub="a/b", id="tiny")
    scripted_registry.models["tiny"].state = 99

    assert client.models.get(model.id).state is ModelState.UNKNOWN


def test_corpora_are_uploaded_from_files_and_texts(client, scripted_extractor, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 400_000)

    client.corpora.upload("file", path, text_split="lines")
    client.corpora.upload("texts", documents=["ä", "b"])

    specs = scripted_extractor.calls["UploadCorpus"]
    assert (specs[0].spec.file_name, specs[0].spec.text_split) == ("a.txt", corpora_pb.TEXT_SPLIT_LINES)
    assert scripted_extractor.uploads[0] == path.read_bytes()
    assert scripted_extractor.uploads[1] == b'{"text": "\\u00e4"}\n{"text": "b"}\n'
    assert [corpus.id for corpus in client.corpora.list()] == ["file", "texts"]


def test_a_malformed_corpus_names_its_line(client, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{broken\n")

    with pytest.raises(errors.CorpusMalformed) as caught:
        client.corpora.upload("bad", path)

    assert caught.value.line == 1


def test_an_error_while_reading_documents_arrives_as_itself(client):
    def documents():
        yield "x" * 1_000_000
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        client.corpora.upload("bad", documents=documents())


@pytest.mark.parametrize("arguments", [{}, {"path": "/nowhere/x.txt"}, {"documents": "one text"}])
def test_bad_uploads_are_refused_before_a_call(client, arguments):
    with pytest.raises(errors.InvalidArgument):
        client.corpora.upload("bad", **arguments)


def test_corpora_by_path_token_ids_and_deletion(client, scripted_extractor):
    client.corpora.register_path("p", "/data/x.parquet", text_column="body")
    client.corpora.register_token_ids("t", [[1, 2], [3]])
    client.corpora.delete("p")

    sent = scripted_extractor.calls["RegisterCorpus"]
    assert (sent[0].path.path, sent[0].spec.text_column) == ("/data/x.parquet", "body")
    assert [list(one.token_ids) for one in sent[1].token_ids.documents] == [[1, 2], [3]]
    with pytest.raises(errors.CorpusNotFound):
        client.corpora.get("p")
    with pytest.raises(errors.CorpusNotFound):
        client.corpora.delete("p")


def test_corpora_of_conversations_of_the_hub_and_of_other_corpora(client, scripted_extractor):
    client.corpora.upload("c", documents=[[{"role": "user", "content": "hi"}]], chat=True)
    client.corpora.register_hub("h", "owner/name", split="train", text_column="messages", chat=True, hub_token="t")
    client.corpora.register_mix("m", {"a": 1, "b": 0.5}, seed=2**64 - 1, max_documents=9)

    assert scripted_extractor.calls["UploadCorpus"][0].spec.chat
    hub, mix = scripted_extractor.calls["RegisterCorpus"]
    assert (hub.hub.repo_id, hub.hub.split, hub.hub.hub_token) == ("owner/name", "train", "t")
    assert (hub.spec.text_column, hub.spec.chat) == ("messages", True)
    assert [(part.corpus_id, part.weight) for part in mix.mix.parts] == [("a", 1), ("b", 0.5)]
    assert (mix.mix.seed, mix.mix.max_documents) == (2**64 - 1, 9)
    for wrong in ({"seed": -1}, {"max_documents": "all"}):
        with pytest.raises(errors.InvalidArgument):
            client.corpora.register_mix("m", {"a": 1, "b": 1}, **wrong)


def test_an_extraction_carries_recipe_and_retention(client, scripted_extractor):
    recipe = Recipe(context_size=64, packing="one_document", eos="document", storage_dtype="bfloat16")

    extraction = client.extractions.start("tiny", "docs", HOOKPOINT, recipe=recipe, retention=Window(), max_rows=5)

    spec = scripted_extractor.calls["StartExtraction"][0].spec
    assert spec.retention.kind == ex_pb.RETENTION_KIND_WINDOW
    assert (spec.recipe.packing, spec.max_rows) == (ex_pb.PACKING_ONE_DOCUMENT, 5)
    assert extraction.recipe == recipe
    assert extraction.recipe.packing is Packing.ONE_DOCUMENT
    assert extraction.retention == Window()


def test_an_object_in_place_of_its_id_is_refused_by_the_field_that_it_was_given_for(client):
    extraction = client.extractions.get(EXTRACTION_ID)

    for call in (client.extractions.get, client.extractions.wait, client.extractions.cancel):
        with pytest.raises(errors.InvalidArgument, match=r"extraction_id .* Extraction") as caught:
            call(extraction)
        assert set(caught.value.fields) == {"extraction_id"}


def test_a_recipe_names_what_is_allowed():
    with pytest.raises(errors.InvalidArgument, match="packed, one_document"):
        Recipe(packing="tight")
    # Token ids are int32, activations never.
    with pytest.raises(errors.InvalidArgument, match="float32, float16, bfloat16, float8_e4m3, int8, not 'int32'"):
        Recipe(storage_dtype="int32")


def test_estimate_says_none_for_an_unknown_time(client):
    estimate = client.extractions.estimate("tiny", "docs", [HOOKPOINT])

    assert (estimate.n_rows, estimate.seconds) == (10, None)


def test_watching_an_extraction_survives_a_cut_and_a_new_server(client, extractor_host, scripted_extractor):
    scripted_extractor.faults.append(Fault("cut", after=2))

    events = list(client.extractions.watch(EXTRACTION_ID))

    assert [event.seq for event in events] == [0, 1, 1, 2, 3, 4, 5]
    assert events[-1].extraction.state == "DONE"


@pytest.mark.parametrize(("state", "kind"), [("FAILED", errors.DiskFull), ("CANCELLED", errors.ExtractionCancelled)])
def test_wait_raises_how_an_extraction_ended(client, scripted_extractor, state, kind):
    scripted_extractor.end_state = ex_pb.ExtractionState.Value(f"EXTRACTION_STATE_{state}")
    scripted_extractor.extraction.failure.reason = "DISK_FULL"

    with pytest.raises(kind):
        client.extractions.wait(EXTRACTION_ID, deadline_s=10)


def test_wait_returns_a_done_extraction_with_progress(client):
    seen = []

    extraction = client.extractions.wait(EXTRACTION_ID, on_progress=seen.append, deadline_s=10)

    assert extraction.ended
    assert [one.n_rows for one in seen] == [0, 200, 400, 600, 800, 1000]


def test_cancel_and_unknown_extractions(client):
    assert client.extractions.cancel(EXTRACTION_ID).state == "CANCELLED"
    with pytest.raises(errors.ExtractionNotFound):
        client.extractions.get("nope")


def test_hookpoints_tokens_sets_nodes_and_residencies(client):
    assert [one.name for one in client.hookpoints("tiny")] == [SECOND, HOOKPOINT]
    assert client.decode_tokens("tiny", [1, 2]) == ["<1>", "<2>"]
    assert [one.id for one in client.sets.list()] == ["set-1"]
    assert client.sets.get("set-1")[0].n_rows == 7
    assert client.nodes()[0].devices[0].kind == "cpu"
    assert client.residencies.load("tiny").state == "LOADING"
    assert client.residencies.list() == []


def test_without_a_living_node_the_error_says_so(hosts):
    registry = ScriptedRegistry()
    registry.add_node("n1", "127.0.0.1:1", residency_pb.NODE_STATE_LOST)
    host = hosts(registry)

    with HeadraceClient.connect(host.address) as client, pytest.raises(errors.NodeLost):
        client.extractions.get(EXTRACTION_ID)


def test_a_node_that_holds_the_corpus_is_chosen_best_with_the_model_resident(hosts):
    registry = ScriptedRegistry()
    nodes = {name: ScriptedExtractor() for name in ("a", "b", "c")}
    for name, extractor in nodes.items():
        registry.add_node(name, hosts(extractor).address)
    for name in ("b", "c"):
        nodes[name].corpora["docs"] = corpora_pb.Corpus(id="docs")
    state = residency_pb.RESIDENCY_STATE_RESIDENT
    registry.residencies = [residency_pb.Residency(id="r", model_id="tiny", node_id=n, state=state) for n in ("a", "c")]

    with HeadraceClient.connect(hosts(registry).address) as client:
        client.extractions.start("tiny", "docs", HOOKPOINT)

    assert [len(extractor.calls["StartExtraction"]) for extractor in nodes.values()] == [0, 0, 1]


def corpora_on(hosts, digests):
    """Starts an extractor for each node, with a corpus `docs` of that digest unless it is None."""
    registry = ScriptedRegistry()
    nodes = {name: ScriptedExtractor() for name in digests}
    for name, extractor in nodes.items():
        registry.add_node(name, hosts(extractor).address)
        if digests[name] is not None:
            extractor.corpora["docs"] = corpora_pb.Corpus(id="docs", digest=digests[name])
    return hosts(registry), nodes


def test_a_list_of_corpora_names_the_node_of_each(hosts):
    registry, _ = corpora_on(hosts, {"a": "1", "b": None, "c": "1"})

    with HeadraceClient.connect(registry.address) as client:
        assert [(corpus.id, corpus.node_id) for corpus in client.corpora.list()] == [("docs", "a"), ("docs", "c")]
        assert client.corpora.get("docs").node_id == "a"


def test_a_corpus_is_deleted_from_all_nodes_or_from_the_one_named(hosts):
    registry, nodes = corpora_on(hosts, {"a": "1", "b": None, "c": "1", "d": "1"})

    with HeadraceClient.connect(registry.address) as client:
        one = client.corpora.delete("docs", node="c")
        left = [name for name, node in nodes.items() if node.corpora]
        rest = client.corpora.delete("docs")
        with pytest.raises(errors.CorpusNotFound):
            client.corpora.delete("docs")

    assert (one, left, rest) == (("c",), ["a", "d"], ("a", "d"))
    assert not any(node.corpora for node in nodes.values())


def test_no_node_is_picked_for_a_corpus_that_differs_between_nodes(hosts):
    registry, nodes = corpora_on(hosts, {"a": "1" * 64, "b": "2" * 64})

    with HeadraceClient.connect(registry.address) as client:
        with pytest.raises(errors.AlreadyExists, match="a \\(111111111111\\), b \\(222222222222\\)"):
            client.extractions.start("tiny", "docs", HOOKPOINT)
        client.extractions.start("tiny", "docs", HOOKPOINT, node="b")

    assert [len(node.calls["StartExtraction"]) for node in nodes.values()] == [0, 1]


def test_a_given_extractor_needs_no_registry(extractor_host):
    with HeadraceClient.connect("127.0.0.1:1", extractor=extractor_host.address) as client:
        assert client.extractions.get(EXTRACTION_ID).id == EXTRACTION_ID
        with client.chunks(EXTRACTION_ID) as stream:
            assert next(stream).n_rows == 64


def test_the_client_imports_and_streams_without_torch(registry_host):
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "sae_lens"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
from headrace_client import HeadraceClient
import headrace_cli.__main__
with HeadraceClient.connect({registry_host.address!r}) as client:
    with client.chunks({EXTRACTION_ID!r}) as stream:
        print(sum(chunk.n_rows for chunk in stream))
    try:
        client.activations({EXTRACTION_ID!r})
    except ImportError:
        print("no tensors")
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)

    assert done.stdout.split("\n")[:2] == ["1000", "no tensors"], done.stderr
