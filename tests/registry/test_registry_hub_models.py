"""Models of hub repos through the services: pinned commits, tokens that leave no trace, downloads that go on."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import grpc
import psycopg
import pytest
from test_registry_hub import WEIGHTS, download_children

from fix_hub import SHA, Fault, Hub
from fix_postgres import RegistryStubs, refused, running_registry
from fix_registry import FakeNode, cpu, until, until_state, write_model
from headrace.registry.v1 import model_pb2, node_service_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.models.allowances import Allowances
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

STATES = model_pb2.ModelState
TOKEN = "hf_0123456789secret"
LATER = "f" * 40


async def register(
    stubs: RegistryStubs, model_id: str = "tiny", *, revision: str = "", **fields: str
) -> model_pb2.Model:
    source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny", revision=revision))
    model = model_pb2.Model(id=model_id, source=source)
    return (await stubs.models.RegisterModel(pb.RegisterModelRequest(model=model, **fields), timeout=20)).model


async def prepare(stubs: RegistryStubs, model_id: str = "tiny", **fields: str) -> None:
    await stubs.models.PrepareModel(pb.PrepareModelRequest(model_id=model_id, **fields), timeout=20)


async def outcome(stubs: RegistryStubs, model_id: str = "tiny", *, timeout_s: float = 40.0) -> model_pb2.Model:
    """Watches until a preparation has ended."""
    call = stubs.models.WatchModel(pb.WatchModelRequest(model_id=model_id), timeout=timeout_s)
    async for event in call:
        if event.model.state in (STATES.MODEL_STATE_READY, STATES.MODEL_STATE_FAILED):
            call.cancel()
            return event.model
    raise AssertionError("the watch ended")


async def test_a_branch_is_pinned_at_registration_and_never_moves(hub: Hub, database_url, tmp_path):
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        model = await register(registry.stubs)
        hub.commit = LATER
        again = await register(registry.stubs)
        newer = await register(registry.stubs, "newer")
        exact = await register(registry.stubs, "exact", revision=SHA)
        hub.commit = SHA
        await prepare(registry.stubs)
        ready = await outcome(registry.stubs)
        await prepare(registry.stubs, "newer")
        gone = await outcome(registry.stubs, "newer")

    assert (model.commit_sha, model.state) == (SHA, STATES.MODEL_STATE_REGISTERED)
    assert (again.commit_sha, newer.commit_sha, exact.commit_sha) == (SHA, LATER, SHA)
    assert (ready.state, ready.commit_sha) == (STATES.MODEL_STATE_READY, SHA)
    assert gone.failure.reason == "HUB_NOT_FOUND"
    assert {each.path for each in hub.requests(WEIGHTS)} == {f"/owner/tiny/resolve/{SHA}/{WEIGHTS}"}


async def test_the_card_that_the_hub_tells_is_kept(hub: Hub, database_url, tmp_path):
    hub.card = {"license": "other", "license_name": "tiny-licence", "license_link": "LICENSE", "tags": ["text"]}
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        await register(registry.stubs)
        await prepare(registry.stubs)
        ready = await outcome(registry.stubs)

    assert (ready.card.license, ready.card.license_link) == ("tiny-licence", "LICENSE")


async def test_a_hub_out_of_reach_leaves_the_commit_to_the_preparation(hub: Hub, database_url, tmp_path):
    hub.faults.append(Fault(on="/revision/main", status=503))
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        model = await register(registry.stubs)
        await prepare(registry.stubs)
        ready = await outcome(registry.stubs)

    assert model.commit_sha == ""
    assert ready.commit_sha == SHA


async def test_a_token_is_neither_stored_nor_logged(hub: Hub, database_url, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    hub.token = TOKEN
    hub.faults += [Fault(on=WEIGHTS, status=503), Fault(on=WEIGHTS, cut_after=50_000)]
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        unknown = await register(registry.stubs)
        known = await register(registry.stubs, "other", hub_token=TOKEN)
        await prepare(registry.stubs)
        closed = await outcome(registry.stubs)
        await prepare(registry.stubs, hub_token=TOKEN)
        ready = await until_state(registry.stubs, "tiny", STATES.MODEL_STATE_READY, timeout_s=40)
        too_long = await refused(
            registry.stubs.models.PrepareModel(
                pb.PrepareModelRequest(model_id="tiny", hub_token="x" * 1025), timeout=20
            )
        )
    with psycopg.connect(database_url) as conn:
        tables = [row[0] for row in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'headrace'")]
        texts = [str(row[0]) for table in tables for row in conn.execute(f'SELECT t::text FROM "{table}" t').fetchall()]
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]

    assert (unknown.commit_sha, known.commit_sha) == ("", SHA)
    assert (closed.failure.reason, ready.commit_sha) == ("HUB_GATED", SHA)
    assert too_long.fields == ("hub_token",)
    assert any("tiny" in text for text in texts)
    assert not [text for text in texts if TOKEN in text]
    assert "failed: HUB_GATED" in caplog.text
    assert TOKEN not in caplog.text
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


async def test_a_registry_that_takes_over_without_the_token_says_what_is_lost(hub: Hub, database_url, tmp_path):
    hub.token = TOKEN
    hub.held.set()
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as first:
        await register(first.stubs, hub_token=TOKEN)
        await prepare(first.stubs, hub_token=TOKEN)
        await until(lambda: hub.served_bytes(WEIGHTS) > 0)
    hub.held.clear()
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as second:
        closed = await outcome(second.stubs)
        await prepare(second.stubs, hub_token=TOKEN)
        ready = await until_state(second.stubs, "tiny", STATES.MODEL_STATE_READY, timeout_s=40)

    assert closed.failure.reason == "HUB_GATED"
    assert "prepare the model again with it" in closed.failure.message
    assert ready.commit_sha == SHA


async def test_quantized_checkpoints_are_refused_at_registration(hub: Hub, database_url, tmp_path):
    config = hub.folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    roots = (tmp_path,)
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment, roots=roots) as registry:
        sources = (
            model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny")),
            model_pb2.ModelSource(folder=model_pb2.FolderSource(path=str(hub.folder))),
        )
        requests = [pb.RegisterModelRequest(model=model_pb2.Model(source=source)) for source in sources]
        refusals = [await refused(registry.stubs.models.RegisterModel(request, timeout=20)) for request in requests]
        listed = await registry.stubs.models.ListModels(pb.ListModelsRequest(), timeout=20)

    assert [refusal.reason for refusal in refusals] == ["MODEL_UNSUPPORTED"] * 2
    assert all("quantized by fp8" in refusal.message for refusal in refusals)
    assert not listed.models


async def test_many_registrations_at_once_are_all_pinned(hub: Hub, database_url, tmp_path):
    """Each asks the hub by a process of its own, of which few run at a time."""
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        models = await asyncio.gather(*(register(registry.stubs, f"m{number}") for number in range(10)))

    assert [model.commit_sha for model in models] == [SHA] * 10


async def test_cancelling_kills_the_download_and_preparing_again_fetches_the_rest(hub: Hub, database_url, tmp_path):
    hub.held.set()
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        await register(registry.stubs)
        await prepare(registry.stubs)
        part = tmp_path / "data" / "models" / f"tiny-{SHA[:12]}" / f".{WEIGHTS}.part"
        await until(lambda: part.exists() and part.stat().st_size == 500)
        cancelled = (await registry.stubs.models.CancelPreparation(pb.CancelPreparationRequest(model_id="tiny"))).model
        await until(lambda: not download_children())
        hub.held.clear()
        await prepare(registry.stubs)
        ready = await outcome(registry.stubs)

    assert cancelled.state == STATES.MODEL_STATE_REGISTERED
    assert (ready.commit_sha, ready.store_bytes) == (SHA, tree_bytes(hub))
    assert ready.files_path == str(part.parent)
    assert [each.range for each in hub.requests(WEIGHTS)] == ["", "bytes=500-"]


async def test_watching_tells_percent_bytes_rate_eta_and_why_it_waits(hub: Hub, database_url, tmp_path):
    hub.faults += [Fault(on=WEIGHTS, status=429, headers={"Retry-After": "1"}), Fault(on=WEIGHTS, drip_bytes=4_000)]
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        await register(registry.stubs)
        await prepare(registry.stubs)
        transfers, messages = [], []
        async for event in registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="tiny"), timeout=40):
            messages.append(event.message)
            if event.model.state == STATES.MODEL_STATE_DOWNLOADING:
                transfers.append(event.model.transfer)
            if event.model.state == STATES.MODEL_STATE_READY:
                break

    moving = [each for each in transfers if 0 < each.percent < 100 and each.rate_bytes_per_s > 0]
    assert all(each.total_bytes == tree_bytes(hub) and each.eta_s > 0 for each in moving)
    assert moving[-1].eta_s < 10  # The whole download takes 3 s.
    assert any("429" in message and "trying again in 1 s" in message for message in messages)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(on=WEIGHTS, status=403, times=9), "HUB_GATED"),
        (Fault(on=WEIGHTS, status=404, times=9), "HUB_NOT_FOUND"),
        (Fault(on=WEIGHTS, corrupt=True, times=9), "DIGEST_MISMATCH"),
        (Fault(on=WEIGHTS, status=429, headers={"Retry-After": "900"}, times=9), "HUB_UNAVAILABLE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_download_that_fails_names_its_reason_and_can_be_tried_again(
    hub: Hub, database_url, tmp_path, fault, reason
):
    hub.faults.append(fault)
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        await register(registry.stubs)
        await prepare(registry.stubs)
        failed = await outcome(registry.stubs)
        hub.faults.clear()
        await prepare(registry.stubs)
        ready = await until_state(registry.stubs, "tiny", STATES.MODEL_STATE_READY, timeout_s=40)

    assert failed.failure.reason == reason
    assert ready.commit_sha == SHA


async def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: Hub, database_url, tmp_path):
    async with running_registry(
        database_url, tmp_path / "data", environment=hub.environment, models_quota_bytes=100_000
    ) as registry:
        await register(registry.stubs)
        await prepare(registry.stubs)
        failed = await outcome(registry.stubs)

    assert failed.failure.reason == "DISK_FULL"
    assert str(tree_bytes(hub)) in failed.failure.message
    assert "room for 100000" in failed.failure.message
    assert not hub.requests(WEIGHTS)


async def test_a_repo_of_pickles_is_refused_with_the_remedy(hub: Hub, database_url, tmp_path):
    (hub.folder / WEIGHTS).rename(hub.folder / "pytorch_model.bin")
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        await register(registry.stubs)
        await prepare(registry.stubs)
        failed = await outcome(registry.stubs)

    assert failed.failure.reason == "NOT_ALLOWED"
    assert "--allow-pickle owner/tiny" in failed.failure.message


@pytest.mark.parametrize("quantization", [model_pb2.QUANTIZATION_NONE, model_pb2.QUANTIZATION_INT8])
async def test_pickles_that_are_allowed_are_converted_by_a_node_and_removed(
    hub: Hub, database_url, tmp_path, quantization
):
    (hub.folder / WEIGHTS).rename(hub.folder / "pytorch_model.bin")
    allowances = Allowances(pickle_repos=frozenset({"owner/tiny"}))
    builds = []

    def build(wanted: node_service_pb2.Build) -> None:
        builds.append((wanted.source_path, wanted.target_path, wanted.kind, wanted.model.quantization))
        write_model(Path(wanted.target_path))

    async with running_registry(
        database_url, tmp_path / "data", environment=hub.environment, allowances=allowances
    ) as registry:
        node = FakeNode(registry.stubs, "node-a", [cpu()])
        node.convert = build
        await node.start()
        source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny"))
        model = model_pb2.Model(id="tiny", source=source, quantization=quantization)
        await registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)
        await prepare(registry.stubs)
        ready = await outcome(registry.stubs)
        pickled = tmp_path / "data" / "models" / f"tiny-{SHA[:12]}"
        await until(lambda: not pickled.exists())
        await node.stop()

    unpickled = f"{pickled}-unpickled"
    assert builds[0] == (str(pickled), unpickled, node_service_pb2.BUILD_KIND_CONVERT_PICKLED, quantization)
    assert builds[1:] == (
        [(unpickled, f"{pickled}-int8", node_service_pb2.BUILD_KIND_QUANTIZE, quantization)]
        if quantization == model_pb2.QUANTIZATION_INT8
        else []
    )
    assert ready.files_path == builds[-1][1]
    assert (ready.state, ready.commit_sha, ready.n_parameters) == (STATES.MODEL_STATE_READY, SHA, 336)


@pytest.mark.fault
async def test_a_killed_registry_goes_on_with_its_download_and_forgets_what_is_orphaned(
    hub: Hub, start_registry, data_dir
):
    hub.held.set()
    environment = {name: value for name, value in hub.environment.items() if name.startswith("HF_")}
    first = await asyncio.to_thread(start_registry, environment=environment)
    async with grpc.aio.insecure_channel(first.address) as channel:
        stubs = RegistryStubs(channel)
        for model_id in ("tiny", "orphan"):
            await register(stubs, model_id)
            await prepare(stubs, model_id)
        folders = {name: data_dir / "models" / f"{name}-{SHA[:12]}" for name in ("tiny", "orphan")}
        for folder in folders.values():
            part = folder / f".{WEIGHTS}.part"
            await until(lambda part=part: part.exists() and part.stat().st_size == 500)
    children = download_children()
    await asyncio.to_thread(first.kill)
    await until(lambda: not set(children) & set(download_children()))
    await asyncio.to_thread(delete_model, data_dir, "orphan")
    hub.held.clear()
    second = await asyncio.to_thread(start_registry, environment=environment)
    async with grpc.aio.insecure_channel(second.address) as channel:
        ready = await outcome(RegistryStubs(channel))
        await until(lambda: not folders["orphan"].exists())
    ranges = [each.range for each in hub.requests(WEIGHTS)]
    assert await asyncio.to_thread(second.terminate) == 0

    assert len(children) == 2
    assert ready.commit_sha == SHA
    assert sorted(ranges) == ["", "", "bytes=500-"]
    assert {path.name for path in (data_dir / "models").iterdir()} == {folders["tiny"].name}


def delete_model(data_dir: Path, model_id: str) -> None:
    """Deletes a model as another replica does, which can't reach the disk of this replica."""
    server = EmbeddedPostgres(data_dir)
    server.start()  # The embedded server outlived the registry.
    with psycopg.connect(server.url) as conn:
        conn.execute("DELETE FROM headrace.models WHERE id = %s", (model_id,))


def tree_bytes(hub: Hub) -> int:
    return sum(path.stat().st_size for path in hub.folder.iterdir() if path.suffix != ".md")
