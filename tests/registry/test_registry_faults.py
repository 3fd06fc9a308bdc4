"""Real processes killed with 9: the postmaster under a live registry, and the registry in the middle of its work."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fix_postgres import RegistryStubs, refusal_of
from fix_registry import FakeNode, acquire, cpu, ready_model, until_state, write_model
from headrace.registry.v1 import model_pb2, node_service_pb2, residency_service_pb2
from headrace.registry.v1 import model_service_pb2 as pb

pytestmark = pytest.mark.fault


def postmaster_of(data_dir: Path) -> int:
    return int((data_dir / "postgres" / "postmaster.pid").read_text().split()[0])


async def outcome(call: object) -> str:
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as exc:
        return refusal_of(exc).reason
    return "OK"


async def test_a_killed_postmaster_comes_back_under_a_live_registry(start_registry, data_dir):
    running = await asyncio.to_thread(start_registry)
    async with grpc.aio.insecure_channel(running.address) as channel:
        stubs = RegistryStubs(channel)
        folder = data_dir / "files"
        await ready_model(stubs, folder, "tiny")
        node = FakeNode(stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        lease = await acquire(stubs, "tiny")
        watch = stubs.models.WatchModel(pb.WatchModelRequest(model_id="tiny"), timeout=50)
        await watch.read()
        old = postmaster_of(data_dir)
        os.kill(old, signal.SIGKILL)
        started = time.monotonic()
        get = pb.GetModelRequest(model_id="tiny")
        calls = [stubs.models.GetModel(get, timeout=15) for _ in range(10)]
        outcomes = await asyncio.gather(*(outcome(call) for call in calls))
        took_s = time.monotonic() - started
        # It is back: the same node, residency and lease, and the watch goes on.
        await stubs.models.GetModel(get, timeout=15)
        await node.heartbeat()
        renewal = residency_service_pb2.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        renewed = await stubs.residencies.RenewLease(renewal, timeout=15)
        update = pb.UpdateModelRequest(model=model_pb2.Model(id="tiny", labels={"a": "b"}))
        update.update_mask.paths.append("labels")
        await stubs.models.UpdateModel(update, timeout=15)
        event = await watch.read()
        watch.cancel()
        await node.stop()

    assert set(outcomes) <= {"OK", "DATABASE_UNAVAILABLE"}
    assert took_s < 14
    assert postmaster_of(data_dir) != old
    assert renewed.lease.id == lease.id
    assert event.model.labels == {"a": "b"}
    assert await asyncio.to_thread(running.terminate) == 0


async def test_a_killed_registry_goes_on_preparing_after_its_restart(start_registry, data_dir):
    first = await asyncio.to_thread(start_registry)
    gguf = data_dir / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    async with grpc.aio.insecure_channel(first.address) as channel:
        stubs = RegistryStubs(channel)
        source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
        await stubs.models.RegisterModel(pb.RegisterModelRequest(model=model_pb2.Model(id="m", source=source)))
        await stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"))
    await asyncio.to_thread(first.kill)
    postmaster = postmaster_of(data_dir)  # It outlives the registry and is attached to again.
    second = await asyncio.to_thread(start_registry)
    async with grpc.aio.insecure_channel(second.address) as channel:
        stubs = RegistryStubs(channel)
        node = FakeNode(stubs, "node-a", [cpu()])
        node.convert = lambda build: write_model(Path(build.target_path))
        await node.start()
        model = await until_state(stubs, "m", model_pb2.MODEL_STATE_READY)
        await node.stop()

    assert model.n_parameters == 336
    assert postmaster_of(data_dir) == postmaster
    assert await asyncio.to_thread(second.terminate) == 0
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


async def test_the_program_serves_its_services_and_says_when_it_is_ready(start_registry, data_dir):
    running = await asyncio.to_thread(start_registry)
    async with grpc.aio.insecure_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("ModelService", "ResidencyService", "NodeService", "ActivationSetService"):
            request = health_pb2.HealthCheckRequest(service=f"headrace.registry.v1.{service}")
            assert (await health.Check(request, timeout=10)).status == health_pb2.HealthCheckResponse.SERVING
        stubs = RegistryStubs(channel)
        source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path="/etc"))
        refused = await outcome(
            stubs.models.RegisterModel(pb.RegisterModelRequest(model=model_pb2.Model(source=source)), timeout=10)
        )
        watch = stubs.nodes.WatchAssignments  # An open watch must not hold the exit up.
        node = FakeNode(stubs, "node-a", [cpu()])
        await node.register()
        call = watch(node_service_pb2.WatchAssignmentsRequest(node_id="node-a", epoch=1))
        await call.read()
        started = time.monotonic()
        assert await asyncio.to_thread(running.terminate) == 0
        took_s = time.monotonic() - started
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()

    assert refused == "PATH_NOT_ALLOWED"
    assert refusal_of(ended.value).reason == "SHUTTING_DOWN"
    assert took_s < 6
    assert [line["message"] for line in running.log_lines() if line["logger"] == "headrace_registry"] == [
        "registry ready"
    ]


def test_a_second_registry_on_the_same_data_directory_does_not_start(start_registry, data_dir):
    start_registry()
    with pytest.raises(AssertionError, match="Another registry runs"):
        start_registry()
