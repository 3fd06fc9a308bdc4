"""ModelService over gRPC: registration, listing, change, deletion, preparation, events."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from google.protobuf import field_mask_pb2

from fix_postgres import refused, running_registry
from fix_registry import new_request_id, ready_model, register_folder, until_state, write_model, write_safetensors
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb

FAILED = model_pb2.MODEL_STATE_FAILED
READY = model_pb2.MODEL_STATE_READY


def hub_model(repo_id: str = "owner/Tiny-LM", **fields: object) -> model_pb2.Model:
    return model_pb2.Model(source=model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id=repo_id)), **fields)


async def register(stubs, model: model_pb2.Model, request_id: str = "") -> model_pb2.Model:
    request = pb.RegisterModelRequest(request_id=request_id, model=model)
    return (await stubs.models.RegisterModel(request, timeout=20)).model


async def listed(stubs, **fields: object) -> list[str]:
    answer = await stubs.models.ListModels(pb.ListModelsRequest(**fields), timeout=20)
    return [model.id for model in answer.models]


async def test_a_hub_model_gets_an_id_from_its_name(registry):
    model = await register(registry.stubs, hub_model(labels={"team": "a"}))

    assert model.id == "tiny-lm"
    assert model.state == model_pb2.MODEL_STATE_REGISTERED
    assert model.source.hub.revision == "main"
    assert model.labels == {"team": "a"}
    assert model.etag


async def test_the_same_model_again_is_the_existing_one_and_another_gets_another_id(registry):
    first = await register(registry.stubs, hub_model())
    again = await register(registry.stubs, hub_model())
    other = await register(registry.stubs, hub_model("other/Tiny-LM"))

    assert (first.id, again.id, other.id) == ("tiny-lm", "tiny-lm", "other-tiny-lm")


async def test_an_id_taken_by_a_different_model_already_exists(registry):
    await register(registry.stubs, hub_model(id="mine"))
    refusal = await refused(
        registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=hub_model("other/x", id="mine")), timeout=20)
    )

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")


async def test_a_request_id_repeats_the_answer_and_refuses_other_arguments(registry):
    request_id = new_request_id()
    first = await register(registry.stubs, hub_model(), request_id)
    again = await register(registry.stubs, hub_model(), request_id)
    refusal = await refused(
        registry.stubs.models.RegisterModel(
            pb.RegisterModelRequest(request_id=request_id, model=hub_model("owner/else")), timeout=20
        )
    )

    assert first.id == again.id
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("request_id",))


async def test_a_repeated_registration_answers_as_the_first_whatever_became_of_its_folder(registry, tmp_path):
    await asyncio.to_thread(write_model, tmp_path / "m")
    source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path=str(tmp_path / "m")))
    request_id = new_request_id()
    first = await register(registry.stubs, model_pb2.Model(source=source), request_id)
    (tmp_path / "m").rename(tmp_path / "gone")
    again = await register(registry.stubs, model_pb2.Model(source=source), request_id)

    assert (again.id, again.etag) == (first.id, first.etag)


async def test_concurrent_registrations_of_one_model_make_one(registry):
    models = await asyncio.gather(*(register(registry.stubs, hub_model()) for _ in range(8)))

    assert {model.id for model in models} == {"tiny-lm"}
    assert await listed(registry.stubs) == ["tiny-lm"]


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (model_pb2.Model(), "model.source"),
        (hub_model("a/b/c"), "model.source.hub.repo_id"),
        (hub_model(id="Bad Id"), "model.id"),
        (hub_model(labels={"Bad Key": "x"}), "labels"),
        (
            model_pb2.Model(source=model_pb2.ModelSource(folder=model_pb2.FolderSource(path="x"))),
            "model.source.folder.path",
        ),
        (hub_model(quantization=99), "model.quantization"),
    ],
)
async def test_bad_registrations_name_their_field(registry, model, field):
    refusal = await refused(registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refusal.fields == (field,)


async def test_unknown_load_options_are_refused(registry):
    bad = hub_model()
    bad.load_options.update({"trust_remote_code": True})
    refusal = await refused(registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=bad), timeout=20))
    assert refusal.fields == ("load_options",)


async def test_a_path_outside_the_roots_is_refused(registry):
    for path in ("/etc", str(registry.data_dir / ".." / ".." / "..")):
        model = model_pb2.Model(source=model_pb2.ModelSource(folder=model_pb2.FolderSource(path=path)))
        refusal = await refused(registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20))
        assert refusal.reason in ("PATH_NOT_ALLOWED", "FIELD_INVALID")
    assert refusal.reason == "FIELD_INVALID"


async def test_an_unknown_model_is_not_found_by_every_call(registry):
    stubs = registry.stubs.models
    calls = [
        stubs.GetModel(pb.GetModelRequest(model_id="nope")),
        stubs.DeleteModel(pb.DeleteModelRequest(model_id="nope")),
        stubs.PrepareModel(pb.PrepareModelRequest(model_id="nope")),
        stubs.CancelPreparation(pb.CancelPreparationRequest(model_id="nope")),
        stubs.WatchModel(pb.WatchModelRequest(model_id="nope")),
    ]

    assert [(await refused(call)).reason for call in calls] == ["MODEL_NOT_FOUND"] * 5


async def test_models_are_listed_in_pages_and_tokens_are_bound_to_the_filter(registry):
    for name in ("a", "b", "c", "d", "e"):
        await register(registry.stubs, hub_model(f"o/{name}", labels={"team": "x" if name < "d" else "y"}))
    first = await registry.stubs.models.ListModels(pb.ListModelsRequest(page_size=2, filter="labels.team = x"))
    second = await registry.stubs.models.ListModels(
        pb.ListModelsRequest(page_size=2, filter="labels.team = x", page_token=first.next_page_token)
    )
    refusal = await refused(registry.stubs.models.ListModels(pb.ListModelsRequest(page_token=first.next_page_token)))

    assert [m.id for m in first.models] == ["a", "b"]
    assert ([m.id for m in second.models], second.next_page_token) == (["c"], "")
    assert refusal.fields == ("page_token",)


async def test_filters_select(registry, tmp_path):
    await ready_model(registry.stubs, tmp_path, "llama-like")
    await register(registry.stubs, hub_model("o/SmolLM2"))

    assert await listed(registry.stubs, filter="state = READY") == ["llama-like"]
    assert await listed(registry.stubs, filter="model_type = llama AND id : LIKE") == ["llama-like"]
    assert await listed(registry.stubs, filter="repo_id : smol") == ["smollm2"]
    assert await listed(registry.stubs, filter="id : %") == []
    assert (await refused(registry.stubs.models.ListModels(pb.ListModelsRequest(filter="x = y")))).fields == ("filter",)


async def test_update_takes_what_the_mask_names_and_checks_the_etag(registry):
    model = await register(registry.stubs, hub_model(labels={"a": "1"}))
    change = model_pb2.Model(id=model.id, labels={"b": "2"}, etag=model.etag)
    change.load_options.update({"dtype": "bfloat16"})
    mask = field_mask_pb2.FieldMask(paths=["labels"])
    updated = (await registry.stubs.models.UpdateModel(pb.UpdateModelRequest(model=change, update_mask=mask))).model
    stale = await refused(registry.stubs.models.UpdateModel(pb.UpdateModelRequest(model=change, update_mask=mask)))
    bad_mask = field_mask_pb2.FieldMask(paths=["state"])
    unknown = await refused(
        registry.stubs.models.UpdateModel(pb.UpdateModelRequest(model=change, update_mask=bad_mask))
    )

    assert updated.labels == {"b": "2"}
    assert "dtype" not in updated.load_options
    assert (stale.code, stale.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert unknown.fields == ("update_mask",)


async def test_delete_forgets_and_repeats_by_request_id(registry):
    model = await register(registry.stubs, hub_model())
    request = pb.DeleteModelRequest(request_id=new_request_id(), model_id=model.id)
    await registry.stubs.models.DeleteModel(request)
    await registry.stubs.models.DeleteModel(request)

    assert await listed(registry.stubs) == []


async def test_a_folder_is_prepared_in_place_with_exact_counts(registry, tmp_path):
    model = await ready_model(registry.stubs, tmp_path, "tiny")

    assert (model.n_parameters, model.weight_bytes) == (336, 1024 + 160)
    assert model.parameters_by_dtype == {"F32": 256, "BF16": 80}
    assert model.files_path == str(tmp_path / "tiny")
    assert model.commit_sha.startswith("sha256:")
    assert (model.architecture.model_type, model.architecture.n_layers) == ("llama", 2)
    assert len(model.tokenizer_digest) == 64
    assert not model.HasField("transfer")


async def test_a_ready_model_stays_ready(registry, tmp_path):
    before = await ready_model(registry.stubs, tmp_path, "tiny")
    after = (await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="tiny"))).model

    assert (after.state, after.etag) == (READY, before.etag)


async def test_a_bad_folder_fails_with_its_reason_and_can_be_prepared_again(registry, tmp_path):
    folder = await asyncio.to_thread(write_model, tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    await register_folder(registry.stubs, folder, "m")
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    async for event in registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m"), timeout=20):
        if event.model.state == FAILED:
            break
    assert event.model.failure.reason == "MODEL_UNSUPPORTED"
    assert "save_pretrained" in event.model.failure.message

    (folder / "model.safetensors").write_bytes(weights)
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    assert not (await until_state(registry.stubs, "m", READY)).HasField("failure")


async def test_watching_gives_a_snapshot_then_every_event_in_order(registry, tmp_path):
    folder = await asyncio.to_thread(write_model, tmp_path / "m")
    await register_folder(registry.stubs, folder, "m")
    call = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m"), timeout=20)
    events = [await call.read()]
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    while events[-1].model.state != READY:
        events.append(await call.read())
    call.cancel()
    late = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m", after_seq=events[0].seq), timeout=20)
    replayed = [await late.read() for _ in events]
    late.cancel()

    assert events[0].snapshot
    seqs = [event.seq for event in events]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    assert events[1].message == "preparation started"
    assert replayed[0].snapshot
    assert replayed[0].model.state == READY
    assert [e.seq for e in replayed[1:]] == seqs[1:]
    assert replayed[1].model.state == model_pb2.MODEL_STATE_DOWNLOADING


async def test_a_watcher_of_a_deleted_model_is_told(registry):
    model = await register(registry.stubs, hub_model())
    call = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id=model.id), timeout=20)
    await call.read()
    await registry.stubs.models.DeleteModel(pb.DeleteModelRequest(model_id=model.id))

    assert (await refused(call.read())).reason == "MODEL_NOT_FOUND"


async def test_cancelling_brings_the_model_back_to_registered(registry, tmp_path):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
    await register(registry.stubs, model_pb2.Model(id="m", source=source))
    started = (await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))).model
    cancelled = (await registry.stubs.models.CancelPreparation(pb.CancelPreparationRequest(model_id="m"))).model
    again = await refused(registry.stubs.models.CancelPreparation(pb.CancelPreparationRequest(model_id="m")))

    assert started.state == model_pb2.MODEL_STATE_CONVERTING
    assert cancelled.state == model_pb2.MODEL_STATE_REGISTERED
    assert (again.code, again.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STATE_CONFLICT")


async def test_a_gguf_waits_for_a_node_and_is_converted_by_it(registry, tmp_path, start_node):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
    await register(registry.stubs, model_pb2.Model(id="m", source=source))
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    call = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m", after_seq=1), timeout=20)
    messages = []
    async for event in call:
        messages.append(event.message)
        if "waits for a node" in event.message:
            await start_node(convert=lambda build: write_model(tmp_path.__class__(build.target_path)))
        if event.model.state == READY:
            break
    call.cancel()

    model = event.model
    assert "waits for a node; start an extractor" in messages
    assert model.files_path == str(registry.data_dir / "models" / f"m-{model.commit_sha[7:19]}")
    assert model.n_parameters == 336


async def test_a_build_that_fails_says_why(registry, tmp_path, start_node):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    node = await start_node(convert=lambda _: None)
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
    await register(registry.stubs, model_pb2.Model(id="m", source=source))
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    async for event in registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m"), timeout=20):
        if event.model.state == FAILED:
            break

    # The node reported the build as done but made no files: the inspection finds out.
    assert event.model.failure.reason == "MODEL_UNSUPPORTED"
    assert node.epoch == 1


async def test_a_file_that_is_no_gguf_fails(registry, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind")
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(tmp_path / "m.gguf")))
    await register(registry.stubs, model_pb2.Model(id="m", source=source))
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    async for event in registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m"), timeout=20):
        if event.model.state == FAILED:
            break

    assert event.model.failure.reason == "MODEL_UNSUPPORTED"


async def test_a_preparation_goes_on_in_another_replica(database_url, tmp_path):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    data_dir = tmp_path / "data"
    async with running_registry(database_url, data_dir, roots=(tmp_path,)) as first:
        source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
        model = await register(first.stubs, model_pb2.Model(id="m", source=source))
        await first.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
        async for event in first.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m"), timeout=20):
            if "waits for a node" in event.message:
                target = data_dir / "models" / f"m-{event.model.commit_sha[7:19]}"
                break
    await asyncio.to_thread(write_model, target)

    async with running_registry(database_url, data_dir, roots=(tmp_path,)) as second:
        ready = await until_state(second.stubs, model.id, READY)
        assert ready.files_path == str(target)


async def test_a_large_folder_reports_progress(registry, tmp_path, monkeypatch):
    folder = await asyncio.to_thread(write_model, tmp_path / "big")
    await asyncio.to_thread(write_safetensors, folder / "model.safetensors", {"w": ("U8", (64_000_000,))})
    monkeypatch.setattr("headrace_registry.workers.sources._PROGRESS_EVERY_S", 0.01)
    monkeypatch.setattr("headrace_registry.workers.sources._LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("headrace_models.folder._READ_BYTES", 64 * 1024)
    await register_folder(registry.stubs, folder, "big")
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="big"))
    transfers = []
    async for event in registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="big"), timeout=30):
        if event.message == "reading the files":
            transfers.append(event.model.transfer)
        if event.model.state == READY:
            break

    assert transfers
    total = 64_000_000 + (folder / "config.json").stat().st_size
    assert all(0 <= t.percent <= 100 and t.total_bytes >= total for t in transfers if t.total_bytes)
    assert [t.done_bytes for t in transfers] == sorted(t.done_bytes for t in transfers)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["q\x00.safetensors", "q\ud800.safetensors"], ids=["NUL", "half a surrogate pair"])
async def test_a_file_name_that_no_database_can_store_fails_its_preparation_alone(registry, tmp_path, name):
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    await register_folder(registry.stubs, folder, "m")
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))

    failed = await until_state(registry.stubs, "m", FAILED)

    assert failed.failure.reason in ("MODEL_UNSUPPORTED", "INTERNAL")
    await register_folder(registry.stubs, write_model(tmp_path / "good"), "good")
    await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="good"))
    await until_state(registry.stubs, "good", READY)
