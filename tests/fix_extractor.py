"""A node of the extractor in this process: real runners (forked), real log, and a registry of few words."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace

import pytest_asyncio

from headrace_extractor.corpora.counting import RowCount
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import ModelNotFound, error_for
from headrace_extractor.extractions.extractions import Extractions
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.node import Node
from headrace_extractor.node.values import Assignment, DesiredState, Device, Lease
from headrace_extractor.reading.row_stream import End, Pause, RowStream, StreamRequest
from headrace_extractor.sets.notes import SetOrders
from headrace_extractor.sets.spec import ExtractionSpec


class FakeRegistry:
    """Implements the ports NodeRegistry and Models: grants everything, loads on demand, remembers what it hears."""

    def __init__(self, models):
        self.models = {model.id: model for model in models}
        self.assigned = {}
        self.reports = []
        self.sets = {}
        self.orders = {}
        self.leases = set()
        self.unavailable = None
        self.pauses = []  # Seconds; as many calls are told to leave the place alone.
        self.address, self.devices, self.machine = "", (), None
        self.heartbeat_interval_s = 5.0
        self._n_residencies = 0
        self._changed = asyncio.Event()

    def _notify(self):
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _check(self):
        if self.unavailable:
            raise self.unavailable

    async def register(self, address, devices, machine):
        self._check()
        self.address, self.devices, self.machine = address, devices, machine
        self.assigned.clear()
        return 1, self.heartbeat_interval_s

    async def heartbeat(self, epoch, devices, machine):
        self._check()
        self.devices, self.machine = devices, machine

    async def assignments(self, epoch):
        while True:
            changed = self._changed
            yield DesiredState(assignments=tuple(self.assigned.values()))
            with contextlib.suppress(TimeoutError):  # As a heartbeat: the stream goes on.
                async with asyncio.timeout(15):
                    await changed.wait()

    async def report_residency(self, epoch, report):
        self.reports.append(report)
        assignment = self.assigned.get(report.residency_id)
        if assignment and report.state in ("FAILED", "UNLOADED"):
            del self.assigned[report.residency_id]
        elif assignment:
            self.assigned[report.residency_id] = replace(assignment, state=report.state)
        self._notify()

    async def report_build(self, epoch, build, *, done, transfer, failure, fidelity=None):
        pass

    async def report_validation(self, epoch, report):
        pass

    async def report_set(self, epoch, held, *, evict=False):
        self._check()
        order = self.orders.get(held.id, SetOrders())
        if held.deleted or (evict and not order.pinned):
            self.sets.pop(held.id, None)
        elif not evict:
            self.sets[held.id] = held
        return order

    async def set_orders(self):
        self._check()
        return dict(self.orders)

    async def get_model(self, model_id):
        self._check()
        if model_id not in self.models:
            raise ModelNotFound(f"no model {model_id}")
        return self.models[model_id]

    async def acquire_lease(self, model_id, *, holder, wait_s):
        self._check()
        if self.pauses:
            metadata = {"node_reason": "RUNNER_LOST", "left_alone_s": f"{self.pauses.pop():.3f}"}
            left_alone_s = float(metadata["left_alone_s"])
            raise error_for("RUNNER_LOST", "it is tried again later", metadata=metadata, left_alone_s=left_alone_s)
        held = next((a for a in self.assigned.values() if a.model.id == model_id), None)
        if held is None:
            self._n_residencies += 1
            held = Assignment(
                residency_id=f"r{self._n_residencies}",
                fence=1,
                device_id="cpu",
                hold=True,
                state="LOADING",
                model=self.models[model_id],
            )
            self.assigned[held.residency_id] = held
            self._notify()
        while self.assigned[held.residency_id].state != "RESIDENT":
            changed = self._changed
            async with asyncio.timeout(60):
                await changed.wait()
            if held.residency_id not in self.assigned:
                failure = self.reports[-1].failure
                raise error_for(failure.reason, failure.message)
        lease = Lease(id=f"l{len(self.leases)}", fence=1, residency_id=held.residency_id, ttl_s=60.0)
        self.leases.add(lease.id)
        yield lease

    async def renew_lease(self, lease):
        self._check()

    async def release_lease(self, lease):
        self.leases.discard(lease.id)


class FakeCounter:
    """Implements the port RowCounter; a test may set `counted`, or replace `count`."""

    counted = RowCount(n_rows=0, n_tokens=0, exact=False)

    async def count(self, spec):
        return self.counted


def model_info(path, model_id="tiny"):
    return ModelInfo(
        id=model_id,
        source="folder",
        commit_sha="sha256:1",
        quantization="none",
        load_options={},
        ready=True,
        model_type="llama",
        n_layers=4,
        d_model=32,
        context_window=512,
        weight_bytes=1,
        files_path=str(path),
        tokenizer_digest="",
    )


class NodeInProcess:
    """One node; `restart` is what a crash of the server leaves, less the crash."""

    def __init__(self, data_dir, registry, start_runner):
        self.data_dir = data_dir
        self.registry = registry
        self._start_process = start_runner
        self.runners = []
        self.limits = None
        self.corpora = None
        self.counter = FakeCounter()
        self._n_corpora = 0

    async def start(self):
        self.corpora = CorpusStore(self.data_dir / "corpora")
        self.node = Node(self.registry, self._start_runner, self._devices, environment=dict(os.environ))
        self.extractions = Extractions(
            self.data_dir,
            models=self.registry,
            corpora=self.corpora,
            node=self.node,
            counter=self.counter,
            device_id="cpu",
            registry=self.registry,
            limits=self.limits,
        )
        self.extractions.recover()
        self.task = asyncio.create_task(self.node.run(address="127.0.0.1:7471"))

    async def stop(self):
        await self.extractions.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.corpora.close()

    def add_corpus(self, documents):
        """Ingests documents under a new name, which the next extractions read."""
        self._n_corpora += 1
        return self.corpora.ingest_tokens(f"corpus-{self._n_corpora}", documents)

    async def extract(self, **changes):
        settings = {
            "model_id": "tiny",
            "corpus_id": f"corpus-{self._n_corpora}",
            "hookpoints": ("blocks.1.hook_resid_post",),
            "recipe": Recipe(context_size=64, batch_size=2, bos="document"),
        }
        value = await self.extractions.start("", ExtractionSpec(**(settings | changes)))
        return self.extractions.get(value.id)

    async def read(self, job, deadline_s=60.0, on_run=lambda run: None, **request):
        """Reads a stream to its end; returns (bytes by column, first rows of the runs, end)."""
        stream = RowStream(job, StreamRequest(**request))
        content, firsts = {column.name: [] for column in stream.set_reader.columns}, []
        try:
            async with asyncio.timeout(deadline_s):
                async for event in stream.events():
                    if isinstance(event, End):
                        return {name: b"".join(parts) for name, parts in content.items()}, firsts, event
                    if not isinstance(event, Pause):
                        firsts.append(event.first_row)
                        for column, view in zip(stream.set_reader.columns, event.columns, strict=True):
                            content[column.name].append(bytes(view))
                        on_run(event)
        finally:
            stream.close()

    async def until(self, condition, deadline_s=30.0):
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 -- conditions look at many things
                await asyncio.sleep(0.01)

    async def _start_runner(self, *, environment):
        self.runners.append(await self._start_process(environment=environment))
        return self.runners[-1]

    def _devices(self):
        return (Device(id="cpu", kind="cpu", name="test", capacity_bytes=2**33, free_bytes=2**33),)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def start_extractor(tmp_path_factory, tiny_llama, forked_runners):
    """Starts nodes, each with a registry and data of its own."""
    nodes = []

    async def start():
        registry = FakeRegistry([model_info(tiny_llama)])
        node = NodeInProcess(tmp_path_factory.mktemp("node"), registry, forked_runners.start)
        nodes.append(node)
        await node.start()
        return node

    yield start
    for node in nodes:
        await node.stop()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def extractor(start_extractor):
    """One node for a module's tests, since a runner takes seconds to start; each test brings its own corpus."""
    return await start_extractor()
