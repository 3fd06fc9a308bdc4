"""How a process ended: from outside, by the kernel for want of memory, or by itself."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from headrace_extractor.errors import RunnerLost, reason_of
from headrace_extractor.node import runner_process
from headrace_extractor.node.runner_process import RunnerProcess, is_from_outside, n_out_of_memory_kills
from headrace_extractor.node.runner_protocol import Prepare, Prepared

SILENT = (sys.executable, "-c", "import sys; sys.stdin.read()")


async def lost_by(number: int) -> RunnerLost:
    """Starts a runner that says nothing, and sends a signal to it while it carries out a command."""
    runner = await RunnerProcess.start(environment=dict(os.environ), command=SILENT)
    os.kill(runner.pid, number)
    with pytest.raises(RunnerLost) as raised:
        async for _ in runner.run(Prepare(), ends=(Prepared,)):
            pass
    await runner.kill()
    return raised.value


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
async def test_a_process_that_is_ended_by_a_signal_from_outside_is_interrupted(number):
    lost = await lost_by(number)

    assert lost.metadata["interrupted"] == "true"
    assert reason_of(lost) == "RUNNER_LOST"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
async def test_a_process_that_faults_is_not_interrupted(number):
    assert (await lost_by(number)).metadata["interrupted"] == "false"


async def test_a_process_that_the_kernel_kills_for_want_of_memory_is_not_interrupted(monkeypatch):
    counts = iter([3, 3, 4])
    monkeypatch.setattr(runner_process, "n_out_of_memory_kills", lambda: next(counts))

    assert (await lost_by(signal.SIGKILL)).metadata["interrupted"] == "false"


def test_kills_for_want_of_memory_are_read_from_the_kernel_s_counters(tmp_path):
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 12\noom_kill 7\noom_kill_other 9\n")

    assert n_out_of_memory_kills(vmstat) == 7
    assert n_out_of_memory_kills(tmp_path / "none") == 0
    assert n_out_of_memory_kills() >= 0
    assert not is_from_outside(1, n_kills_before=0, n_kills_now=0)
    assert not is_from_outside(None, n_kills_before=0, n_kills_now=0)
    assert is_from_outside(-signal.SIGTERM, n_kills_before=0, n_kills_now=1)
