"""Builds and validations on a node: real runners, and a registry that only keeps reports."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import psutil
import pytest
import pytest_asyncio

from fix_extractor import model_info
from headrace_extractor.errors import LoadFailed, ModelUnsupported, RegistryUnavailable, RunnerLost, StateConflict
from headrace_extractor.node.builds import Builds, command_of
from headrace_extractor.node.runner_protocol import Converted, Converting, Quantize
from headrace_extractor.node.validations import Validations
from headrace_extractor.node.values import Build, BuildKind, Device, Validation

STEPS = ["dry_load", "load", "forward", "finite", "parity", "unload", "memory_back"]


class Listener:
    """A registry that keeps reports, or refuses them."""

    def __init__(self):
        self.builds = []
        self.validations = []
        self.refusal = None

    async def report_build(self, epoch, build, *, done, transfer, failure, fidelity=None):
        self.builds.append((build.model.id, done, transfer, failure, fidelity))
        if self.refusal and len(self.builds) == 1:
            raise self.refusal

    async def report_validation(self, epoch, report):
        self.validations.append(report)
        if self.refusal:
            raise self.refusal


@pytest.fixture
def listener():
    return Listener()


@pytest_asyncio.fixture
async def runners(forked_runners):
    started = []

    async def start(*, environment):
        started.append(await forked_runners.start(environment=environment))
        return started[-1]

    yield start, started


@pytest_asyncio.fixture
async def builds(listener, runners):
    made = Builds(listener, runners[0], epoch=lambda: 1, environment=dict(os.environ))
    yield made
    await made.close()


@pytest_asyncio.fixture
async def validations(listener, runners):
    devices = [Device(id="cpu", kind="cpu", name="test", capacity_bytes=2**33, free_bytes=2**33)]
    made = Validations(listener, runners[0], lambda: devices, epoch=lambda: 1, environment=dict(os.environ))
    yield made
    await made.close()


async def until(condition, deadline_s=50.0):
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 -- conditions look at many things
            await asyncio.sleep(0.01)


def int8(path, **changes):
    return replace(model_info(path), quantization="int8", **changes)


def convert(path):
    return Build(kind=BuildKind.CONVERT_PICKLED, model=model_info(path), source_path="a", target_path="b")


def quantize(model, source_path="a", target_path="b"):
    return Build(kind=BuildKind.QUANTIZE, model=model, source_path=source_path, target_path=target_path)


def trial(path, load_options=()):
    return Validation(attempt_id="a", model=model_info(path), device_id="cpu", load_options=dict(load_options))


async def test_quantizing_reports_progress_and_fidelity_and_leaves_no_runner(
    tiny_llama, tmp_path, listener, builds, runners
):
    build = quantize(int8(tiny_llama), source_path=str(tiny_llama), target_path=str(tmp_path / "q"))
    builds.follow([build])
    builds.follow([build])
    await until(lambda: listener.builds and (listener.builds[-1][1] or listener.builds[-1][3]))

    model_id, done, _, failure, fidelity = listener.builds[-1]
    assert (model_id, done, failure) == ("tiny", True, None)
    assert [line["layer"] for line in fidelity["layers"]] == [0, 1, 2, 3]
    assert (tmp_path / "q" / "model.safetensors").exists()
    assert len(runners[1]) == 1
    assert not psutil.pid_exists(runners[1][0].pid)


class Silent:
    """A runner that reports progress once, then sends nothing until `ending` is set."""

    def __init__(self):
        self.ending = asyncio.Event()

    async def run(self, command, *, ends):
        yield Converting(done_bytes=3, total_bytes=4)
        await self.ending.wait()
        yield Converted()

    async def kill(self):
        pass


@pytest.mark.parametrize("refusal", [None, LoadFailed("an error of the registry that nobody expects")])
async def test_build_that_says_nothing_for_long_is_not_taken_to_be_forgotten(tiny_llama, listener, refusal):
    runner = Silent()
    listener.refusal = refusal

    async def start(*, environment):
        return runner

    builds = Builds(listener, start, epoch=lambda: 1, environment={}, sign_of_life_s=0.01)
    builds.follow([convert(tiny_llama)])
    await until(lambda: len(listener.builds) >= 3)
    runner.ending.set()
    await until(lambda: listener.builds[-1][1])
    await builds.close()

    assert {(done, transfer.done_bytes) for _, done, transfer, _, _ in listener.builds[:-1]} == {(False, 3)}
    assert [done for _, done, *_ in listener.builds].count(True) == 1


async def test_a_build_whose_runner_hangs_does_not_start_or_does_not_end_is_over_all_the_same(tiny_llama, listener):
    build, runner = convert(tiny_llama), Silent()
    runner.refusal = OSError(11, "no more processes")

    async def start(*, environment):
        if runner.refusal:
            raise runner.refusal
        return runner

    async def kill():
        raise TimeoutError

    runner.kill = kill
    builds = Builds(listener, start, epoch=lambda: 1, environment={}, silence_s=0.3)
    builds.follow([build])
    await until(lambda: not builds._running)
    assert "no more processes" in listener.builds[-1][3].message
    runner.refusal = None
    builds.follow([build])
    await until(lambda: not builds._running)
    assert (listener.builds[-1][3].reason, listener.builds[-1][1]) == ("LOAD_FAILED", False)
    assert "TimeoutError" in listener.builds[-1][3].message
    runner.ending.set()
    builds.follow([build])
    await until(lambda: not builds._running)
    assert (listener.builds[-1][3], listener.builds[-1][1]) == (None, True)


async def test_failed_quantizing_says_why(tmp_path, listener, builds):
    builds.follow([quantize(int8(tmp_path), source_path=str(tmp_path), target_path=str(tmp_path / "q"))])
    await until(lambda: listener.builds)

    assert listener.builds[-1][3].reason == "MODEL_UNSUPPORTED"


def test_build_compares_in_the_dtype_of_the_load_except_float16(tiny_llama):
    def dtype_of(**options):
        model = int8(tiny_llama, load_options={"max_memory": {"cpu": 1}, **options})
        command = command_of(quantize(model))
        assert isinstance(command, Quantize)
        assert "max_memory" not in command.load_options
        return command.dtype

    assert dtype_of() == "float32"
    assert dtype_of(dtype="bfloat16") == "bfloat16"
    assert dtype_of(dtype="float16") == "float32"


def test_build_of_nothing_is_refused(tiny_llama):
    with pytest.raises(ModelUnsupported):
        command_of(Build(kind=BuildKind.CONVERT_GGUF, model=model_info(tiny_llama), target_path="b"))


def test_build_of_a_kind_that_is_not_known_is_refused(tiny_llama):
    with pytest.raises(ModelUnsupported, match="update"):
        command_of(Build(kind=None, model=int8(tiny_llama), source_path="a", target_path="b"))


async def test_validation_reports_every_step_and_gives_everything_back(tiny_llama, listener, validations, runners):
    validations.follow([trial(tiny_llama)])
    await until(lambda: listener.validations and listener.validations[-1].done)

    last = listener.validations[-1]
    assert [(step.name, step.state) for step in last.steps] == [(name, "PASSED") for name in STEPS]
    assert last.failure is None
    assert last.versions["transformers"]
    assert {"RUNNING"} == {report.steps[-1].state for report in listener.validations[:1]}
    assert not psutil.pid_exists(runners[1][0].pid)


async def test_failed_step_is_the_failure_of_the_attempt(tiny_llama, listener, validations):
    validations.follow([trial(tiny_llama, load_options={"sliding_window": 8})])
    await until(lambda: listener.validations and listener.validations[-1].done)

    last = listener.validations[-1]
    assert last.failure.reason == "FIELD_INVALID"
    assert [step.state for step in last.steps] == ["FAILED"] + ["SKIPPED"] * 4 + ["PASSED"] * 2


async def test_runner_that_dies_fails_the_attempt(tiny_llama, listener, validations, runners):
    validations.follow([trial(tiny_llama)])
    await until(lambda: listener.validations)
    psutil.Process(runners[1][0].pid).kill()
    await until(lambda: listener.validations[-1].done)

    assert listener.validations[-1].failure.reason == RunnerLost.reason


async def test_validation_that_is_not_wanted_any_more_is_stopped(tiny_llama, listener, validations, runners):
    validations.follow([trial(tiny_llama)])
    await until(lambda: listener.validations)
    pid = runners[1][0].pid
    validations.follow([])
    await until(lambda: listener.validations[-1].done)

    # Told only once its memory is free: until then the registry counts its bytes.
    assert not psutil.pid_exists(pid)
    assert listener.validations[-1].failure.reason == StateConflict.reason


async def test_finished_validation_is_not_repeated_while_it_is_listed(tiny_llama, listener, validations, runners):
    wanted = [trial(tiny_llama)]
    validations.follow(wanted)
    await until(lambda: listener.validations and listener.validations[-1].done)
    validations.follow(wanted)
    await asyncio.sleep(0)

    assert len(runners[1]) == 1


@pytest.mark.parametrize("refusal", [StateConflict("over"), RegistryUnavailable("away")])
async def test_registry_that_does_not_listen_ends_nothing(tiny_llama, listener, validations, runners, refusal):
    listener.refusal = refusal
    validations.follow([trial(tiny_llama)])
    await until(lambda: listener.validations and listener.validations[-1].done)

    assert [step.state for step in listener.validations[-1].steps] == ["PASSED"] * 7
