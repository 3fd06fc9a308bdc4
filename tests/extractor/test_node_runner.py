"""How a node registers, and how callers wait for the runner of a residency."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import pytest

from fix_extractor import FakeRegistry, model_info
from headrace_extractor.errors import EpochStale, LoadFailed, RunnerLost, WaitTimeout
from headrace_extractor.node.node import Node
from headrace_extractor.node.runner_process import RunnerProcess
from headrace_extractor.node.runner_protocol import Loaded
from headrace_extractor.node.values import Assignment, Device


class FakeRunner:
    """A runner without a process; it loads once `may_load` is set."""

    log_tail = ""

    def __init__(self):
        self.may_load = asyncio.Event()
        self.failure = None
        self.ended = asyncio.Event()

    async def run(self, command, *, ends):
        await self.may_load.wait()
        if self.failure:
            raise self.failure
        yield Loaded(measured_bytes=1)

    async def wait(self):
        await self.ended.wait()

    def lost(self):
        return RunnerLost("the process died")

    async def kill(self):
        self.ended.set()


@contextlib.asynccontextmanager
async def running_node(on_registered=lambda: None):
    """Yields a node, its registry and a runner that has not yet loaded the only residency."""
    registry, runner = FakeRegistry([model_info("/nowhere")]), FakeRunner()
    registry.heartbeat_interval_s = 0.02
    started = asyncio.Event()

    async def start_runner(*, environment):
        started.set()
        return runner

    devices = (Device(id="cpu", kind="cpu", name="test", capacity_bytes=1, free_bytes=1),)
    node = Node(registry, start_runner, lambda: devices, environment={})
    task = asyncio.create_task(node.run(address="10.0.0.1:7471", on_registered=on_registered))
    try:
        await node.until_registered(10)
        residency = Assignment(
            residency_id="r1", fence=1, device_id="cpu", hold=True, state="LOADING", model=model_info("/nowhere")
        )
        registry.assigned["r1"] = residency
        registry._notify()
        async with asyncio.timeout(10):
            await started.wait()
        yield node, registry, runner
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_runner_is_had_as_soon_as_it_has_loaded():
    async with running_node() as (node, _, runner):
        waiting = asyncio.create_task(node.runner_for("r1", 10))
        await asyncio.sleep(0)
        assert not waiting.done()
        runner.may_load.set()
        found, assignment = await waiting

        assert found is runner
        assert assignment.residency_id == "r1"
        assert (await node.runner_for("r1", 0))[0] is runner


async def test_a_runner_that_does_not_load_in_time_is_not_waited_for():
    async with running_node() as (node, _, _):
        with pytest.raises(WaitTimeout, match=r"not on this node after 0 s"):
            await node.runner_for("r1", 0.05)


@pytest.mark.parametrize("end", ["fails", "is dropped"])
async def test_the_wait_for_a_residency_that_ends_unloaded_is_over(end):
    async with running_node() as (node, registry, runner):
        waiting = asyncio.create_task(node.runner_for("r1", 50))
        await asyncio.sleep(0)
        if end == "fails":
            runner.failure = LoadFailed("no such file")
            runner.may_load.set()
        else:
            registry.assigned.clear()
            registry._notify()

        async with asyncio.timeout(10):
            with pytest.raises(RunnerLost):
                await waiting


async def test_a_node_that_registers_again_tells_its_address_and_calls_back_again():
    n_registered = 0
    again = asyncio.Event()

    def on_registered():
        nonlocal n_registered
        n_registered += 1
        if n_registered == 2:
            again.set()

    async with running_node(on_registered) as (node, registry, _):
        assert registry.address == "10.0.0.1:7471"
        registry.unavailable, registry.address = EpochStale("another process took over"), ""
        async with asyncio.timeout(10):
            while node.registered.is_set():  # noqa: ASYNC110 -- an event can't be awaited unset
                await asyncio.sleep(0.01)
            registry.unavailable = None
            await again.wait()

        assert registry.address == "10.0.0.1:7471"


async def test_the_end_of_a_runner_s_log_is_kept_and_all_of_it_is_copied(capsys):
    program = "import sys; sys.stderr.write('x' * 9000 + '\\nfirst line\\nlast line\\n')"
    runner = await RunnerProcess.start(environment=dict(os.environ), command=(sys.executable, "-c", program))
    await runner.wait()
    await runner.kill()

    assert runner.log_tail == "first line\nlast line\n"
    assert capsys.readouterr().err.count("x") == 9000
