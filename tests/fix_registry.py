"""For tests with a registry: tiny models on disk, and a node that speaks NodeService."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest_asyncio

from fix_postgres import RegistryStubs, RunningRegistry
from headrace.common.v1 import transfer_pb2
from headrace.registry.v1 import model_pb2, node_service_pb2, residency_pb2
from headrace.registry.v1 import model_service_pb2 as model_service
from headrace.registry.v1 import residency_service_pb2 as residency_service
from headrace_registry.models.files import architecture_from
from headrace_registry.sizing.reservation import estimated_bytes

GIB = 1024**3
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1}
STATES = residency_pb2.ResidencyState

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
# Estimated bytes of `write_model`'s model on a CPU, its process included; the size of a device that holds one of them.
TINY_BYTES = estimated_bytes({"F32": 256, "BF16": 80}, "float32", architecture=architecture_from(LLAMA))
ROOM_FOR_ONE = TINY_BYTES * 3 // 2


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, seed: int = 0) -> None:
    """Writes a real safetensors file by hand: header length, header, data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = ITEM_BYTES[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    data = (hashlib.sha256(str(seed).encode()).digest() * (offset // 32 + 1))[:offset]
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_model(
    folder: Path,
    *,
    config: Mapping[str, object] = LLAMA,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a folder in transformers' layout; 336 parameters unless told."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = tensors or {"model.embed_tokens.weight": ("F32", (32, 8)), "model.norm.weight": ("BF16", (80,))}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    write_safetensors(folder / "model.safetensors", chosen, seed=seed)
    return folder


async def register_folder(stubs: RegistryStubs, folder: Path, model_id: str = "") -> model_pb2.Model:
    model = model_pb2.Model(id=model_id, source=model_pb2.ModelSource(folder=model_pb2.FolderSource(path=str(folder))))
    answer = await stubs.models.RegisterModel(model_service.RegisterModelRequest(model=model), timeout=20)
    return answer.model


async def ready_model(stubs: RegistryStubs, folder: Path, model_id: str, **options: object) -> model_pb2.Model:
    """Writes, registers and prepares a tiny model."""
    await asyncio.to_thread(write_model, folder / model_id, **options)
    await register_folder(stubs, folder / model_id, model_id)
    await stubs.models.PrepareModel(model_service.PrepareModelRequest(model_id=model_id), timeout=20)
    return await until_state(stubs, model_id, model_pb2.MODEL_STATE_READY)


async def until_state(
    stubs: RegistryStubs, model_id: str, state: model_pb2.ModelState.ValueType, *, timeout_s: float = 20.0
) -> model_pb2.Model:
    """Watches a model until it has the state."""
    call = stubs.models.WatchModel(model_service.WatchModelRequest(model_id=model_id), timeout=timeout_s)
    async for event in call:
        if event.model.state == state:
            call.cancel()
            return event.model
        assert event.model.state != model_pb2.MODEL_STATE_FAILED, event.model.failure
    raise AssertionError("the watch ended")


def new_request_id() -> str:
    return str(uuid.uuid4())


def cpu(capacity_bytes: int = GIB, device_id: str = "cpu") -> residency_pb2.Device:
    return residency_pb2.Device(
        id=device_id,
        kind=residency_pb2.DEVICE_KIND_CPU,
        name="test CPU",
        capacity_bytes=capacity_bytes,
        free_bytes=capacity_bytes,
    )


@dataclass
class FakeNode:
    """An extractor as the registry sees it: registers, follows its assignments, reports.

    `load` is awaited for each load and may report progress, raise NodeFailure, or hang; `obeys` False: it does nothing.
    """

    stubs: RegistryStubs
    id: str
    devices: list[residency_pb2.Device]
    boot_nonce: str = field(default_factory=lambda: uuid.uuid4().hex)
    epoch: int = 0
    measured_bytes: int = 0
    load_gate: asyncio.Event = field(default_factory=asyncio.Event)
    unload_gate: asyncio.Event = field(default_factory=asyncio.Event)
    failure: model_pb2.Failure | None = None
    convert: Callable[[node_service_pb2.Build], None] | None = None
    held: dict[str, residency_pb2.Residency] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    messages: list[node_service_pb2.WatchAssignmentsResponse] = field(default_factory=list)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.register()
        self._watching = asyncio.create_task(self._follow())

    async def register(self) -> None:
        request = node_service_pb2.RegisterNodeRequest(
            node_id=self.id,
            address="127.0.0.1:7471",
            devices=self.devices,
            version="test",
            boot_nonce=self.boot_nonce,
        )
        self.epoch = (await self.stubs.nodes.RegisterNode(request, timeout=20)).epoch

    async def heartbeat(self) -> None:
        request = node_service_pb2.HeartbeatRequest(node_id=self.id, epoch=self.epoch, devices=self.devices)
        await self.stubs.nodes.Heartbeat(request, timeout=20)

    async def stop(self) -> None:
        tasks = [*self._tasks.values(), *([self._watching] if self._watching else [])]
        self._watching = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def report(
        self, residency: residency_pb2.Residency, state: residency_pb2.ResidencyState.ValueType, **fields: object
    ) -> None:
        request = node_service_pb2.ReportResidencyRequest(
            node_id=self.id,
            epoch=self.epoch,
            residency_id=residency.id,
            fence=residency.fence,
            state=state,
            **fields,
        )
        await self.stubs.nodes.ReportResidency(request, timeout=20)

    async def _follow(self) -> None:
        request = node_service_pb2.WatchAssignmentsRequest(node_id=self.id, epoch=self.epoch)
        async for message in self.stubs.nodes.WatchAssignments(request):
            self.messages.append(message)
            for assignment in message.assignments:
                residency = assignment.residency
                act = self._unload if residency.state == STATES.RESIDENCY_STATE_UNLOADING else self._load
                self._start(f"{residency.id} {act.__name__}", act(residency))
            for build in message.builds:
                self._start(f"build {build.target_path}", self._build(build))

    def _start(self, key: str, work: object) -> None:
        if key in self._tasks:
            work.close()  # type: ignore[attr-defined]
        else:
            self._tasks[key] = asyncio.create_task(work)  # type: ignore[arg-type]

    async def _load(self, residency: residency_pb2.Residency) -> None:
        if residency.state == STATES.RESIDENCY_STATE_RESIDENT:
            return
        self.loads.append(residency.model_id)
        transfer = transfer_pb2.Transfer(done_bytes=1, total_bytes=2, percent=50.0)
        await self.report(residency, STATES.RESIDENCY_STATE_LOADING, transfer=transfer)
        await self.load_gate.wait()
        if self.failure is not None:
            await self.report(residency, STATES.RESIDENCY_STATE_FAILED, failure=self.failure)
            return
        self.held[residency.id] = residency
        with contextlib.suppress(grpc.aio.AioRpcError):  # Sent off meanwhile: the stale report is refused.
            await self.report(residency, STATES.RESIDENCY_STATE_RESIDENT, measured_bytes=self.measured_bytes)

    async def _unload(self, residency: residency_pb2.Residency) -> None:
        await self.unload_gate.wait()
        self.held.pop(residency.id, None)
        await self.report(residency, STATES.RESIDENCY_STATE_UNLOADED)

    async def _build(self, build: node_service_pb2.Build) -> None:
        of = {"node_id": self.id, "epoch": self.epoch, "model_id": build.model.id, "target_path": build.target_path}
        request = node_service_pb2.ReportBuildRequest(**of)
        request.transfer.CopyFrom(transfer_pb2.Transfer(done_bytes=1, total_bytes=4, percent=25.0))
        await self.stubs.nodes.ReportBuild(request, timeout=20)
        assert self.convert is not None
        await asyncio.to_thread(self.convert, build)
        await self.stubs.nodes.ReportBuild(node_service_pb2.ReportBuildRequest(**of, done=True), timeout=20)


async def until(fact: Callable[[], object | Awaitable[object]], *, timeout_s: float = 20.0) -> None:
    """Returns once `fact` holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = fact()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.03)


@pytest_asyncio.fixture
async def start_node(registry: RunningRegistry) -> AsyncIterator[Callable[..., object]]:
    """Starts nodes that load and unload at once unless told otherwise."""
    nodes: list[FakeNode] = []

    async def start(node_id: str = "node-a", *, devices: list[residency_pb2.Device] | None = None, **fields: object):
        slow_load, slow_unload = fields.pop("slow_load", False), fields.pop("slow_unload", False)
        node = FakeNode(registry.stubs, node_id, devices or [cpu()], **fields)  # type: ignore[arg-type]
        if not slow_load:
            node.load_gate.set()
        if not slow_unload:
            node.unload_gate.set()
        await node.start()
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        await node.stop()


async def acquire(stubs: RegistryStubs, model_id: str, **fields: object) -> residency_pb2.Lease:
    """Acquires a lease and returns it."""
    events = [event async for event in stubs.residencies.AcquireLease(lease_request(model_id, **fields), timeout=30)]
    assert events[-1].WhichOneof("event") == "granted"
    return events[-1].granted.lease


def lease_request(model_id: str, **fields: object) -> residency_service.AcquireLeaseRequest:
    return residency_service.AcquireLeaseRequest(**{"model_id": model_id, "holder": "a test", **fields})


async def residency_of(stubs: RegistryStubs, residency_id: str) -> residency_pb2.Residency:
    request = residency_service.ListResidenciesRequest(include_ended=True)
    answer = await stubs.residencies.ListResidencies(request, timeout=20)
    return next(each for each in answer.residencies if each.id == residency_id)


async def until_residency(
    stubs: RegistryStubs, residency_id: str, state: residency_pb2.ResidencyState.ValueType, *, timeout_s: float = 20.0
) -> residency_pb2.Residency:
    async with asyncio.timeout(timeout_s):
        while True:
            residency = await residency_of(stubs, residency_id)
            if residency.state == state:
                return residency
            await asyncio.sleep(0.05)
