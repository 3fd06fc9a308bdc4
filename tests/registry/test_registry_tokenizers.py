"""Models whose tokenizer has an older form: a node makes tokenizer.json once, at preparation."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from fix_hub import SHA
from fix_postgres import running_registry
from fix_registry import FakeNode, cpu, register_folder, until, until_state, write_model
from headrace.registry.v1 import model_pb2, node_service_pb2
from headrace.registry.v1 import model_service_pb2 as model_service

READY = model_pb2.MODEL_STATE_READY
MADE = '{"version": "1.0", "made": true}'
DIGEST = hashlib.sha256(MADE.encode()).hexdigest()


def write_older(folder):
    write_model(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def make(build):
    """Does a node's work."""
    target, source = Path(build.target_path), Path(build.source_path)
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    (target / "tokenizer.json").write_text(MADE)


async def prepare(stubs, model_id):
    await stubs.models.PrepareModel(model_service.PrepareModelRequest(model_id=model_id), timeout=20)


async def get(stubs, model_id):
    return (await stubs.models.GetModel(model_service.GetModelRequest(model_id=model_id), timeout=20)).model


async def test_a_registered_folder_is_loaded_through_links_beside_the_tokenizer_made_for_it(
    registry, tmp_path, start_node
):
    folder = await asyncio.to_thread(write_older, tmp_path / "m")
    await start_node(convert=make)
    await register_folder(registry.stubs, folder, "m")
    await prepare(registry.stubs, "m")
    await until_state(registry.stubs, "m", READY)
    model = await get(registry.stubs, "m")
    files = Path(model.files_path)

    assert (model.tokenizer_digest, files.parent) == (DIGEST, tmp_path / "data" / "models")
    assert files.name == f"m-{model.commit_sha[7:19]}-tokenizer"
    assert not (folder / "tokenizer.json").exists()
    assert {file.name for file in model.files} >= {"tokenizer.json", "model.safetensors", "config.json"}
    weights = next(file for file in model.files if file.name == "model.safetensors")
    assert weights.inode == (folder / "model.safetensors").stat().st_ino
    assert weights.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    again = await register_folder(registry.stubs, folder, "m")
    assert again.state == model_pb2.MODEL_STATE_REGISTERED


async def test_a_repo_gets_the_tokenizer_beside_its_files_and_nothing_else_is_left(hub, database_url, tmp_path):
    await asyncio.to_thread(write_older, hub.folder)
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        node = FakeNode(registry.stubs, "node-a", [cpu()], convert=make)
        await node.start()
        source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny"))
        request = model_service.RegisterModelRequest(model=model_pb2.Model(id="m", source=source))
        await registry.stubs.models.RegisterModel(request, timeout=20)
        await prepare(registry.stubs, "m")
        model = await until_state(registry.stubs, "m", READY)
        folder = tmp_path / "data" / "models" / f"m-{SHA[:12]}"
        await until(lambda: [path.name for path in folder.parent.iterdir()] == [folder.name])
        await node.stop()

    assert (model.files_path, model.tokenizer_digest, model.commit_sha) == (str(folder), DIGEST, SHA)
    assert (folder / "tokenizer.json").read_text() == MADE


async def test_a_tokenizer_that_no_node_can_make_leaves_a_model_for_token_ids(registry, tmp_path, start_node):
    folder = await asyncio.to_thread(write_older, tmp_path / "m")
    node = await start_node()

    async def fail(build):
        failure = model_pb2.Failure(reason="MODEL_UNSUPPORTED", message="The tokenizer can't be converted: why.")
        of = {"node_id": node.id, "epoch": node.epoch, "model_id": build.model.id, "target_path": build.target_path}
        await registry.stubs.nodes.ReportBuild(node_service_pb2.ReportBuildRequest(**of, failure=failure), timeout=20)

    node._build = fail
    await register_folder(registry.stubs, folder, "m")
    await prepare(registry.stubs, "m")
    await until_state(registry.stubs, "m", READY)
    call = registry.stubs.models.WatchModel(model_service.WatchModelRequest(model_id="m", after_seq=1), timeout=20)
    async for event in call:
        if not event.snapshot and event.model.state == READY:
            message = event.message
            call.cancel()
            break
    model = await get(registry.stubs, "m")

    assert (model.files_path, model.tokenizer_digest) == (str(folder), "")
    assert message == "ready; The tokenizer can't be converted: why."
