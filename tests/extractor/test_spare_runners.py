"""Runners that are started ahead: with fake processes, with a real one, and in a real extractor."""

from __future__ import annotations

import asyncio
import contextlib
import os

import psutil
import pytest

from fix_system import FAST, HOOKPOINT, MODEL, eventually, texts
from headrace_extractor.errors import LoadFailed, RunnerLost
from headrace_extractor.node.runner_process import RunnerProcess
from headrace_extractor.node.runner_protocol import Load, Loaded, Prepare, Prepared
from headrace_extractor.node.spare_runners import SpareRunners

ENVIRONMENT = {"NAME": "value"}


class FakeRunner:
    """Answers `prepare` once it may; `silent` is a death that nothing has told of yet."""

    log_tail = ""

    def __init__(self, *, prepares, fails=False):
        self.may_prepare = asyncio.Event()
        if prepares:
            self.may_prepare.set()
        self.fails = fails
        self.commands = []
        self.silent = False
        self.ended = asyncio.Event()
        self.killed = False

    busy = False

    async def run(self, command, *, ends):
        self.commands.append(command)
        await self.may_prepare.wait()
        if self.silent or self.ended.is_set():
            raise RunnerLost("gone")
        if self.fails:
            raise LoadFailed("no torch")
        yield Prepared()

    async def send(self, command):
        raise AssertionError("nothing but `prepare` is sent")

    async def wait(self):
        await self.ended.wait()

    async def kill(self):
        self.killed = True
        self.ended.set()


class FakeFactory:
    """Starts fakes; `started` has all of them, with their environments."""

    def __init__(self, *, prepares=True, fails=False):
        self.prepares, self.fails = prepares, fails
        self.refuses = False
        self.started = []
        self.environments = []
        self.times = []

    async def __call__(self, *, environment):
        self.times.append(asyncio.get_running_loop().time())
        if self.refuses:
            raise OSError("no more processes")
        self.started.append(FakeRunner(prepares=self.prepares, fails=self.fails))
        self.environments.append(environment)
        return self.started[-1]


@contextlib.asynccontextmanager
async def kept(factory, *, environment=ENVIRONMENT, n_spares=1, first_retry_s=0.01):
    spares = SpareRunners(factory, environment=environment, n_spares=n_spares, pause_s=0.0, first_retry_s=first_retry_s)
    keeping = asyncio.create_task(spares.run())
    yield spares
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- conditions look at many things
            await asyncio.sleep(0.005)


async def test_a_spare_is_handed_out_and_its_replacement_started():
    factory = FakeFactory()
    async with kept(factory) as spares:
        await until(lambda: factory.started and factory.started[0].commands == [Prepare()])
        taken = await spares(environment=ENVIRONMENT)
        await until(lambda: len(factory.started) == 2)

    assert taken is factory.started[0]
    assert not taken.killed


async def test_no_more_spares_are_started_than_asked_for():
    factory = FakeFactory()
    async with kept(factory, n_spares=3):
        await until(lambda: len(factory.started) == 3)
        await asyncio.sleep(0.05)

    assert len(factory.started) == 3


async def test_without_a_spare_a_runner_is_started():
    factory = FakeFactory()

    taken = await SpareRunners(factory, environment=ENVIRONMENT, n_spares=0)(environment=ENVIRONMENT)

    assert taken is factory.started[0]
    assert taken.commands == []


async def test_another_environment_gets_a_runner_of_its_own():
    factory, other = FakeFactory(), {"NAME": "other"}
    async with kept(factory) as spares:
        await until(lambda: factory.started)
        taken = await spares(environment=other)

    assert taken is factory.started[1]
    assert factory.environments == [ENVIRONMENT, other]


async def test_a_spare_that_still_imports_is_waited_for():
    factory = FakeFactory(prepares=False)
    async with kept(factory) as spares:
        await until(lambda: factory.started)
        taking = asyncio.create_task(spares(environment=ENVIRONMENT))
        await asyncio.sleep(0.05)
        assert not taking.done()
        factory.started[0].may_prepare.set()

        assert await taking is factory.started[0]


async def test_a_spare_that_died_is_replaced():
    factory = FakeFactory()
    async with kept(factory) as spares:
        await until(lambda: factory.started and factory.started[0].commands)
        factory.started[0].ended.set()
        await until(lambda: len(factory.started) == 2)

        assert await spares(environment=ENVIRONMENT) is factory.started[1]


async def test_a_spare_whose_death_is_not_known_yet_is_not_handed_out():
    factory = FakeFactory()
    async with kept(factory) as spares:
        await until(lambda: factory.started and factory.started[0].commands)
        await asyncio.sleep(0.05)
        factory.started[0].silent = True
        taken = await spares(environment=ENVIRONMENT)

    assert taken is not factory.started[0]
    assert factory.started[0].killed


async def test_a_load_that_is_given_up_leaves_no_runner():
    factory = FakeFactory(prepares=False)
    async with kept(factory) as spares:
        await until(lambda: factory.started)
        taking = asyncio.create_task(spares(environment=ENVIRONMENT))
        await asyncio.sleep(0.05)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)

        assert factory.started[0].killed


@pytest.mark.parametrize("refuses", [True, False], ids=["can't be started", "fails to import"])
async def test_spares_that_fail_are_tried_ever_more_rarely(refuses):
    factory = FakeFactory(fails=True)
    factory.refuses = refuses
    async with kept(factory, first_retry_s=0.02):
        await until(lambda: len(factory.times) == 5)

    waits = [later - earlier for earlier, later in zip(factory.times, factory.times[1:], strict=False)]
    assert all(wait >= least for wait, least in zip(waits, (0.02, 0.04, 0.08, 0.16), strict=True))
    assert all(runner.killed for runner in factory.started)


async def test_closing_ends_the_spares():
    factory = FakeFactory()
    async with kept(factory, n_spares=2):
        await until(lambda: len(factory.started) == 2)

    assert all(runner.killed for runner in factory.started)


async def test_a_model_in_a_spare_is_measured_as_one_in_a_fresh_runner(tiny_llama):
    environment = dict(os.environ)
    load = Load(files_path=str(tiny_llama), device="cpu", dtype="float32")
    loaded, pids = [], []
    async with kept(RunnerProcess.start, environment=environment) as spares:
        for start in (spares, RunnerProcess.start):
            runner = await start(environment=environment)
            pids.append(runner.pid)
            loaded += [event async for event in runner.run(load, ends=(Loaded,)) if isinstance(event, Loaded)]
            await runner.kill()

    in_spare, in_fresh = loaded
    assert in_spare.measured_bytes >= in_spare.runtime_bytes > 0
    assert in_spare.runtime_bytes == pytest.approx(in_fresh.runtime_bytes, rel=0.1)
    assert in_spare.measured_bytes == pytest.approx(in_fresh.measured_bytes, rel=0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.timeout(300)
def test_a_killed_runners_successor_is_the_spare_and_a_killed_extractor_leaves_none(start_system, text_llama):
    system = start_system(
        models_root=text_llama.parent, registry=("--death-window-s", "0"), extractor=("--spare-runners", "1")
    )
    eventually(lambda: len(system.runners()) == 1, "the spare is started")
    system.add_model(MODEL, text_llama)
    extract_all(system)
    loaded, spare = eventually(lambda: two(system.runners()), "the next spare is started")

    loaded.kill()
    extract_all(system)
    runners = eventually(lambda: two(system.runners()), "the spare after the next is started")

    assert runners[0].pid == spare.pid
    assert loaded.pid not in {runner.pid for runner in runners}
    system.extractor.kill()
    _, left = psutil.wait_procs(runners, timeout=10)
    assert not left


def two(runners):
    return runners if len(runners) == 2 else None


def extract_all(system):
    extraction = system.client.extractions.start(MODEL, system.variant(texts(20)), HOOKPOINT, recipe=FAST)
    assert system.client.extractions.wait(extraction.id, deadline_s=60.0).n_rows > 0
