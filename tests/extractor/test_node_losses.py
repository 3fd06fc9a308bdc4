"""Memory that does not come back after an unload: the node reports it, and goes on with all other work."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest

from fix_extractor import FakeRegistry, model_info
from headrace_extractor.errors import RunnerLost
from headrace_extractor.node.node import Node
from headrace_extractor.node.runner_protocol import Loaded
from headrace_extractor.node.values import Assignment, Device, Machine

GB = 10**9


class FakeRunner:
    """A runner without a process: takes `takes_bytes` of its GPU, and gives back all but `keeps_bytes`."""

    log_tail = ""

    def __init__(self, gpu, *, takes_bytes, keeps_bytes=0, unkillable=False):
        self.gpu = gpu
        self.busy = False
        self.takes_bytes = takes_bytes
        self.keeps_bytes = keeps_bytes
        self.unkillable = unkillable
        self.ended = asyncio.Event()

    async def run(self, command, *, ends):
        self.gpu.free_bytes -= self.takes_bytes
        yield Loaded(measured_bytes=self.takes_bytes, runtime_bytes=123)

    async def send(self, command):
        pass

    async def wait(self):
        await self.ended.wait()

    def lost(self):
        return RunnerLost("the process died")

    async def kill(self):
        if self.unkillable:
            raise TimeoutError
        self.die()

    def die(self):
        if not self.ended.is_set():
            self.gpu.free_bytes += self.takes_bytes - self.keeps_bytes
        self.ended.set()


class Gpu:
    """A device with free bytes that the runners change."""

    def __init__(self, device_id="cuda:0"):
        self.free_bytes = 80 * GB
        self.device_id = device_id
        self.answering = threading.Event()
        self.answering.set()
        self.asked = threading.Event()

    def devices(self):
        self.asked.set()
        assert self.answering.wait(30)
        kind = self.device_id.partition(":")[0]
        return (Device(id=self.device_id, kind=kind, name="GPU", capacity_bytes=75 * GB, free_bytes=self.free_bytes),)


@contextlib.asynccontextmanager
async def running_node(gpu, fault=None, **runner):
    registry, runners = FakeRegistry([model_info("/nowhere")]), []
    registry.heartbeat_interval_s = 0.02

    async def start_runner(*, environment):
        if fault:
            raise fault
        runners.append(FakeRunner(gpu, **runner))
        return runners[-1]

    node = Node(
        registry,
        start_runner,
        gpu.devices,
        environment={},
        machine=lambda: Machine(memory_bytes=256 * GB, max_loads=2),
        back_deadline_s=0.3,
    )
    task = asyncio.create_task(node.run(address="127.0.0.1:7471"))
    await node.until_registered(10)
    try:
        yield registry, runners
    finally:
        gpu.answering.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def assignment(gpu, residency_id="r1"):
    return Assignment(
        residency_id=residency_id,
        fence=1,
        device_id=gpu.device_id,
        hold=True,
        state="LOADING",
        model=model_info("/nowhere"),
        reserved_bytes=9 * GB,
    )


async def until(fact):
    async with asyncio.timeout(20):
        while not fact():  # noqa: ASYNC110 -- facts of many kinds
            await asyncio.sleep(0.01)


async def load(registry, wanted):
    registry.assigned[wanted.residency_id] = wanted
    registry._notify()
    await until(lambda: registry.assigned[wanted.residency_id].state == "RESIDENT")


async def unload(registry, residency_id="r1"):
    registry.assigned[residency_id] = replace(registry.assigned[residency_id], hold=False)
    registry._notify()
    await until(lambda: residency_id not in registry.assigned)
    return registry.reports[-1]


def lost_bytes(registry):
    return registry.devices[0].lost_bytes


async def test_memory_that_comes_back_is_no_loss():
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB) as (registry, _):
        await load(registry, assignment(gpu))
        report = await unload(registry)

        assert (report.state, report.lost_bytes) == ("UNLOADED", 0)
        assert lost_bytes(registry) == 0


async def test_memory_the_driver_keeps_is_told_until_it_is_back():
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB, keeps_bytes=8 * GB) as (registry, _):
        await load(registry, assignment(gpu))
        report = await unload(registry)

        assert (report.state, report.lost_bytes) == ("UNLOADED", 8 * GB)
        await until(lambda: lost_bytes(registry) == 8 * GB)
        gpu.free_bytes += 8 * GB
        await until(lambda: lost_bytes(registry) == 0)


async def test_what_is_loaded_after_a_loss_does_not_keep_it_from_ending():
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB, keeps_bytes=8 * GB) as (registry, runners):
        await load(registry, assignment(gpu))
        await unload(registry)
        await load(registry, assignment(gpu, "r2"))
        runners[-1].keeps_bytes = 0
        gpu.free_bytes += 8 * GB  # 70 GB: less than before the loss, by the model loaded now.

        await until(lambda: lost_bytes(registry) == 0)


@pytest.mark.parametrize("device_id", ["cuda:0", "cpu"])
async def test_a_runner_that_can_not_be_ended_keeps_its_bytes_until_it_ends(device_id):
    gpu = Gpu(device_id)
    async with running_node(gpu, takes_bytes=10 * GB, unkillable=True) as (registry, runners):
        await load(registry, assignment(gpu))
        report = await unload(registry)

        assert (report.state, report.lost_bytes) == ("UNLOADED", 10 * GB)
        await until(lambda: lost_bytes(registry) == 10 * GB)
        runners[0].ended.set()
        await until(lambda: lost_bytes(registry) == 0)


async def test_a_slow_unload_holds_up_nothing_else():
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB) as (registry, runners):
        await load(registry, assignment(gpu))
        slow = asyncio.Event()
        runners[0].kill = slow.wait
        unloading = asyncio.create_task(unload(registry))
        await until(lambda: not registry.assigned["r1"].hold)
        await load(registry, assignment(gpu, "r2"))

        assert "r1" in registry.assigned
        slow.set()
        await unloading


async def test_a_runner_is_ended_though_its_node_leaves_meanwhile():
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB) as (registry, runners):
        await load(registry, assignment(gpu))
        gpu.answering.clear()
        gpu.asked.clear()
        registry.assigned["r1"] = replace(registry.assigned["r1"], hold=False)
        registry._notify()
        await until(gpu.asked.is_set)  # The driver is asked before the runner is ended.
        (node,) = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "Node.run"]
        node.cancel()
        await asyncio.sleep(0.05)
        gpu.answering.set()
        await asyncio.wait([node], timeout=20)

        assert node.cancelled()
        assert runners[0].ended.is_set()


async def test_a_runner_that_does_not_start_is_a_failure_at_once():
    gpu = Gpu()
    async with running_node(gpu, fault=OSError(11, "no more processes"), takes_bytes=0) as (registry, _):
        registry.assigned["r1"] = assignment(gpu)
        registry._notify()
        await until(lambda: registry.reports)

        assert (registry.reports[-1].state, registry.reports[-1].failure.reason) == ("FAILED", "LOAD_FAILED")
        assert "no more processes" in registry.reports[-1].failure.message


@pytest.mark.parametrize("keeps", [0, 9 * GB])
async def test_a_runner_that_dies_reports_what_it_kept(keeps):
    """The driver has its memory back before the node asks it."""
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB, keeps_bytes=keeps) as (registry, runners):
        await load(registry, assignment(gpu))
        await load(registry, assignment(gpu, "r2"))
        gpu.asked.clear()
        await until(gpu.asked.is_set)  # By a heartbeat; the baselines of both are known.
        runners[0].die()
        await until(lambda: registry.reports[-1].state == "FAILED")

        assert registry.reports[-1].failure.reason == "RUNNER_LOST"
        assert registry.reports[-1].lost_bytes == keeps
        await until(lambda: lost_bytes(registry) == keeps)


async def test_the_size_of_an_empty_runner_is_told_from_the_first_load_on():
    gpu = Gpu()
    async with running_node(gpu, takes_bytes=10 * GB) as (registry, _):
        await until(lambda: registry.machine is not None)
        before = registry.machine
        await load(registry, assignment(gpu))
        await until(lambda: registry.machine.runtime_bytes == 123)

        assert (before.memory_bytes, before.max_loads, before.runtime_bytes) == (256 * GB, 2, 0)
