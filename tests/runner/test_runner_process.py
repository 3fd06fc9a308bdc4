from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fix_runner import documents
from headrace_extractor import errors
from headrace_extractor.node.runner_protocol import (
    Convert,
    Extract,
    Failed,
    Finished,
    Grant,
    Load,
    Loaded,
    Loading,
    Prepare,
    Prepared,
    Stop,
)
from headrace_extractor.runner.process import Runner, failure_of
from headrace_extractor.runner.throttle import Throttle
from headrace_log.errors import DiskFull, SetCorrupt, TooManyFiles


def test_end_of_input_ends_the_process(start_runner):
    runner = start_runner()
    runner.close_input()

    assert runner.wait() == 0


def test_sigterm_ends_the_process_at_once_and_sigint_does_not(start_runner):
    runner = start_runner()
    runner.send_raw(b"{}\n")
    runner.next()  # The first event: its signal handlers are set.
    runner.signal(signal.SIGINT)
    runner.send_raw(b"{}\n")
    assert isinstance(runner.next(), Failed)
    runner.signal(signal.SIGTERM)

    assert runner.wait() == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_runner_dies_with_its_server_even_if_its_input_stays_open():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import subprocess, sys, time; r = [sys.executable, '-m', 'headrace_extractor.runner'];"
                "p = subprocess.Popen(r, stdin=0, stdout=subprocess.PIPE); p.stdout.readline();"
                "print(p.pid, flush=True); time.sleep(60)"
            ),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    parent.stdin.write(b"{}\n")
    parent.stdin.flush()
    runner_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while is_alive(runner_pid) and time.monotonic() < end:
        time.sleep(0.01)
    parent.stdin.close()
    parent.stdout.close()

    assert not is_alive(runner_pid)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_libraries_print_does_not_reach_the_events():
    script = (
        "import os; from headrace_extractor.runner import __main__ as m; fd = m._keep_stdout_for_events();"
        "print('noise', flush=True); os.system('echo noise'); os.write(fd, b'event')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=20)

    assert done.stdout == b"event"
    assert done.stderr == b"noise\nnoise\n"


def test_libraries_that_ask_a_question_take_no_command():
    script = (
        "from headrace_extractor.runner import __main__ as m; commands = m._keep_stdin_for_commands()\n"
        "try:\n  input('yes or no? ')\nexcept EOFError:\n  print('no answer:', commands.readline())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=b"a command\n", capture_output=True, check=True, timeout=20
    )

    assert done.stdout == b"yes or no? no answer: b'a command\\n'\n"


def test_torch_is_not_imported_before_a_command_needs_it():
    script = "import sys; import headrace_extractor.runner.__main__; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=20).returncode == 0


def test_a_prepared_runner_loads(tiny_gpt2, start_runner):
    runner = start_runner()
    for _ in range(2):
        runner.send(Prepare())
        assert runner.next() == Prepared()
    runner.send(Load(files_path=str(tiny_gpt2), device="cpu", dtype="float32"))

    runner.until(Loaded)


def test_commands_are_answered_in_order_and_bad_ones_do_no_harm(tiny_gpt2, make_set, make_corpus, start_runner):
    runner = start_runner()
    corpus, folder = make_corpus(documents(10)), make_set(["blocks.3.hook_resid_post"])
    extract = Extract(set_id="a", set_path=str(folder), corpus_path=str(corpus))
    runner.send(extract)
    assert_failed(runner.next(), "STATE_CONFLICT", set_id="a")
    runner.send_raw(b'{"kind": "abacus"}\n')
    assert_failed(runner.next(), "INTERNAL")
    runner.send(Load(files_path="/nowhere", device="cpu", dtype="float32"))
    assert_failed(runner.next(), "MODEL_UNSUPPORTED")
    runner.send(Load(files_path=str(tiny_gpt2), device="cpu", dtype="float32", quantization="int8"))
    assert_failed(runner.next(), "MODEL_UNSUPPORTED")
    runner.send(Load(files_path=str(tiny_gpt2), device="cpu", dtype="float32"))
    assert isinstance(runner.next(), Loading)
    loaded = runner.until(Loaded)

    assert loaded.measured_bytes > 0
    assert loaded.runtime_bytes > 20_000_000  # An interpreter with torch takes more than this, whatever the machine.
    runner.send(Load(files_path=str(tiny_gpt2), device="cpu", dtype="float32"))
    assert_failed(runner.next(), "STATE_CONFLICT")

    unknown = make_set(["blocks.9.hook_resid_post"])
    runner.send(Extract(set_id="b", set_path=str(unknown), corpus_path=str(corpus)))
    failed = runner.next()
    assert_failed(failed, "HOOKPOINT_NOT_FOUND", set_id="b")
    assert failed.metadata["nearest"] == "blocks.3.hook_resid_post"
    runner.send(Grant(set_id="gone", row=5))
    runner.send(Stop(set_id="gone"))
    runner.send(Convert(source_path="/nowhere.gguf", target_path=str(folder.parent / "converted")))
    assert_failed(runner.next(), "MODEL_UNSUPPORTED")
    runner.send(extract)
    finished = runner.until(Finished)
    assert finished.set_id == "a"
    assert finished.complete


def assert_failed(event, reason, set_id=""):
    assert isinstance(event, Failed), event
    assert (event.reason, event.set_id) == (reason, set_id)
    assert event.message


def test_unforeseen_error_goes_to_standard_error_only(capsys):
    failed = failure_of(ZeroDivisionError("secret"))

    assert failed.reason == "INTERNAL"
    assert "secret" not in failed.message
    assert "ZeroDivisionError: secret" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exc", "reason", "metadata"),
    [
        (errors.NonFinite("x", metadata={"document": "1"}), "NON_FINITE", {"document": "1"}),
        (DiskFull(Path("x"), required_bytes=2, free_bytes=1), "DISK_FULL", {"required_bytes": "2", "free_bytes": "1"}),
        (SetCorrupt("x"), "DIGEST_MISMATCH", {}),
        (TooManyFiles(max_files=1024), "TOO_MANY_STREAMS", {"max_files": "1024"}),
        (errors.FieldInvalid("x", field="dtype"), "FIELD_INVALID", {"field": "dtype"}),
    ],
)
def test_expected_errors_have_their_reason(exc, reason, metadata):
    failed = failure_of(exc)

    assert (failed.reason, failed.metadata) == (reason, metadata)


def test_command_queue_is_bounded():
    events = []
    runner = Runner(events.append)
    for number in range(65):
        runner._take(Extract(set_id=str(number), set_path="", corpus_path=""))

    assert [(event.reason, event.set_id) for event in events] == [("QUEUE_FULL", "64")]


def test_throttle_says_yes_at_most_so_often():
    now = [0.0]
    throttle = Throttle(20, clock=lambda: now[0])
    yes = 0
    for step in range(1000):
        now[0] = step / 1000
        yes += throttle.ready()

    assert yes == 20


def test_broken_pipe_ends_the_process(start_runner):
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace_extractor.runner"], stdin=subprocess.PIPE, stdout=write_fd
    )
    os.close(write_fd)
    os.close(read_fd)
    process.stdin.write(b"{}\n")
    process.stdin.flush()

    assert process.wait(10) == 1
    process.stdin.close()
