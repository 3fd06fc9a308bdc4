"""Files that change under a READY model: registering or preparing it again notices, and gives it another commit."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

import pytest

from fix_postgres import refused, running_registry
from fix_registry import (
    acquire,
    ready_model,
    register_folder,
    until,
    until_residency,
    until_state,
    write_model,
)
from headrace.registry.v1 import model_pb2, node_service_pb2, residency_pb2
from headrace.registry.v1 import model_service_pb2 as model_service
from headrace.registry.v1 import residency_service_pb2 as residency_service

READY = model_pb2.MODEL_STATE_READY
REGISTERED = model_pb2.MODEL_STATE_REGISTERED
WEIGHTS = "model.safetensors"


async def prepare(stubs, model_id, **fields):
    request = model_service.PrepareModelRequest(model_id=model_id, **fields)
    return (await stubs.models.PrepareModel(request, timeout=20)).model


async def get(stubs, model_id):
    return (await stubs.models.GetModel(model_service.GetModelRequest(model_id=model_id), timeout=20)).model


def overwrite(path, *, at=-1):
    """Changes one byte in place: name, size and inode stay."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


async def test_a_ready_model_has_stamps_of_the_files_that_a_load_reads(registry, tmp_path):
    model = await ready_model(registry.stubs, tmp_path, "m")
    stamped = {file.name: file for file in (await get(registry.stubs, "m")).files}
    found = (tmp_path / "m" / WEIGHTS).stat()

    assert sorted(stamped) == ["config.json", WEIGHTS, "tokenizer.json"]
    assert (stamped[WEIGHTS].size_bytes, stamped[WEIGHTS].mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert stamped["tokenizer.json"].sha256 == model.tokenizer_digest
    assert not model.files  # Events would be as large as the list of files.


@pytest.mark.parametrize("how", ["register", "prepare"])
async def test_weights_overwritten_in_place_are_a_new_commit(registry, tmp_path, how):
    before = await ready_model(registry.stubs, tmp_path, "m")
    await asyncio.to_thread(overwrite, tmp_path / "m" / WEIGHTS)
    if how == "register":
        again = await register_folder(registry.stubs, tmp_path / "m", "m")
        assert (again.state, again.commit_sha, again.files_path) == (REGISTERED, "", "")
    await prepare(registry.stubs, "m")
    after = await until_state(registry.stubs, "m", READY)

    assert after.commit_sha.startswith("sha256:")
    assert after.commit_sha != before.commit_sha


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
async def test_a_tokenizer_a_config_and_a_template_are_files_of_the_model(registry, tmp_path, name):
    before = await ready_model(registry.stubs, tmp_path, "m")
    path = tmp_path / "m" / name
    text = await asyncio.to_thread(lambda: path.read_text() if path.exists() else "{}")
    await asyncio.to_thread(path.write_text, text.replace("}", " }"))
    await prepare(registry.stubs, "m")

    assert (await until_state(registry.stubs, "m", READY)).commit_sha != before.commit_sha


async def test_files_that_are_as_they_were_are_not_prepared_again(registry, tmp_path):
    before = await ready_model(registry.stubs, tmp_path, "m")
    await asyncio.to_thread((tmp_path / "m" / "notes.txt").write_text, "mine")
    await register_folder(registry.stubs, tmp_path / "m", "m")
    after = await prepare(registry.stubs, "m")

    assert (after.state, after.etag) == (READY, before.etag)


async def test_a_repeated_preparation_keeps_what_the_first_call_prepared(registry, tmp_path):
    await ready_model(registry.stubs, tmp_path, "m")
    request_id = str(uuid.uuid4())
    await prepare(registry.stubs, "m", verify=True, request_id=request_id)
    before = await until_state(registry.stubs, "m", READY)
    again = await prepare(registry.stubs, "m", verify=True, request_id=request_id)

    assert (again.state, again.etag) == (READY, before.etag)
    assert (await refused(prepare(registry.stubs, "m", request_id=request_id))).fields == ("request_id",)


async def test_a_touched_folder_keeps_its_commit(registry, tmp_path):
    before = await ready_model(registry.stubs, tmp_path, "m")
    await asyncio.to_thread(os.utime, tmp_path / "m" / WEIGHTS, (1, 1))
    await prepare(registry.stubs, "m")
    after = await until_state(registry.stubs, "m", READY)
    stamp = next(file for file in (await get(registry.stubs, "m")).files if file.name == WEIGHTS)

    assert after.commit_sha == before.commit_sha
    assert stamp.mtime_ns == 10**9


async def test_a_model_in_memory_is_unloaded_before_its_changed_files_are_prepared(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m")
    await start_node()
    lease = await acquire(registry.stubs, "m")
    await asyncio.to_thread(overwrite, tmp_path / "m" / WEIGHTS)
    assert (await refused(prepare(registry.stubs, "m"))).reason == "MODEL_IN_USE"
    assert (await get(registry.stubs, "m")).state == READY
    await registry.stubs.residencies.ReleaseLease(
        residency_service.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence), timeout=20
    )
    await prepare(registry.stubs, "m")
    await until_state(registry.stubs, "m", READY)

    ended = await until_residency(registry.stubs, lease.residency_id, residency_pb2.RESIDENCY_STATE_UNLOADED)
    assert ended.n_leases == 0


async def test_nodes_are_told_the_files_that_they_shall_load(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m")
    node = await start_node()
    await acquire(registry.stubs, "m")
    assigned = [each.model for message in node.messages for each in message.assignments]

    assert {file.name for file in assigned[-1].files} == {"config.json", WEIGHTS, "tokenizer.json"}


async def test_a_load_that_failed_is_tried_at_once_with_files_prepared_anew(registry, tmp_path, start_node):
    await ready_model(registry.stubs, tmp_path, "m")
    node = await start_node(failure=model_pb2.Failure(reason="MODEL_CHANGED", message="Files changed."))
    assert (await refused(acquire(registry.stubs, "m"))).reason == "MODEL_CHANGED"
    node.failure = None
    await asyncio.to_thread(overwrite, tmp_path / "m" / WEIGHTS)
    await prepare(registry.stubs, "m")
    await until_state(registry.stubs, "m", READY)

    assert (await acquire(registry.stubs, "m")).residency_id


async def test_a_gguf_file_that_changes_is_a_new_commit(registry, tmp_path, start_node):
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    await start_node(convert=lambda build: write_model(Path(build.target_path)))
    source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
    request = model_service.RegisterModelRequest(model=model_pb2.Model(id="m", source=source))
    await registry.stubs.models.RegisterModel(request, timeout=20)
    await prepare(registry.stubs, "m")
    before = await until_state(registry.stubs, "m", READY)
    await asyncio.to_thread(overwrite, gguf)
    again = await registry.stubs.models.RegisterModel(request, timeout=20)
    assert again.model.state == REGISTERED
    await prepare(registry.stubs, "m")
    after = await until_state(registry.stubs, "m", READY)

    assert after.commit_sha != before.commit_sha
    assert after.files_path != before.files_path


async def test_a_gguf_file_in_parts_needs_all_of_them_and_its_commit_covers_them(registry, tmp_path, start_node):
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    parts[0].write_bytes(b"GGUF" + bytes(100))
    builds: list[node_service_pb2.Build] = []
    await start_node(convert=lambda build: (builds.append(build), write_model(Path(build.target_path))))
    stubs = registry.stubs

    def request(path):
        source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(path)))
        return model_service.RegisterModelRequest(model=model_pb2.Model(id="m", source=source))

    await stubs.models.RegisterModel(request(parts[0]), timeout=20)
    await prepare(stubs, "m")
    await until(lambda: failed(stubs, "m"))
    assert parts[1].name in (await get(stubs, "m")).failure.message
    parts[1].write_bytes(b"GGUF" + bytes(50))
    assert "give m-00001-of-00002.gguf" in (await refused(stubs.models.RegisterModel(request(parts[1])))).message
    await prepare(stubs, "m")
    before = await until_state(stubs, "m", READY)
    await asyncio.to_thread(overwrite, parts[1])
    await prepare(stubs, "m")
    after = await until_state(stubs, "m", READY)

    assert [build.model.source.gguf.path for build in builds] == [str(parts[0])] * 2
    assert after.commit_sha != before.commit_sha


async def failed(stubs, model_id):
    return (await get(stubs, model_id)).state == model_pb2.MODEL_STATE_FAILED


@pytest.mark.parametrize("hidden", [False, True])
async def test_damaged_files_of_the_store_are_fetched_again(hub, database_url, tmp_path, hidden):
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        stubs = registry.stubs
        source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny"))
        request = model_service.RegisterModelRequest(model=model_pb2.Model(id="m", source=source))
        await stubs.models.RegisterModel(request, timeout=20)
        await prepare(stubs, "m")
        before = await until_state(stubs, "m", READY)
        weights = Path(before.files_path) / WEIGHTS
        was = weights.stat()
        await asyncio.to_thread(overwrite, weights)
        if hidden:  # As a disk that fails: no date tells.
            os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
            assert (await prepare(stubs, "m")).state == READY
        await prepare(stubs, "m", verify=hidden)
        after = await until_state(stubs, "m", READY)

    assert weights.read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    assert (after.commit_sha, after.files_path) == (before.commit_sha, before.files_path)
