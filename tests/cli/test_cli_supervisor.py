"""`headrace up` starts in order, restarts what crashes, and stops in the opposite order."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headrace_cli.processes.supervisor import Child, StartFailed, Supervisor
from headrace_cli.pulling.tensor_files import read_state, write_state

# A server in miniature: writes its address to the ready file and its life to a file, and behaves as told.
SERVER = """
import pathlib, signal, sys, time
name, ready, notes, behaviour = sys.argv[1:5]
def note(text):
    with open(notes, "a") as file:
        file.write(name + " " + text + "\\n")
note("started " + " ".join(sys.argv[5:]))
def stop(*_):
    note("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else stop)
crashes = pathlib.Path(notes + "." + name)
if behaviour == "fails":
    print("port is taken", flush=True)
    sys.exit(3)
pathlib.Path(ready).write_text("127.0.0.1:1" if name == "registry" else "127.0.0.1:2")
if behaviour == "crashes" and not crashes.exists():
    crashes.write_text("")
    time.sleep(0.3)
    sys.exit(1)
time.sleep(60)
"""


@pytest.fixture
def make_child(tmp_path):
    def make(name, behaviour="good"):
        ready, notes = tmp_path / f"{name}.ready", tmp_path / "notes"

        def command(addresses):
            known = [f"{key}={value}" for key, value in addresses.items()]
            return [sys.executable, "-c", SERVER, name, str(ready), str(notes), behaviour, *known]

        return Child(
            name=name, command=command, ready_file=ready, log_file=tmp_path / "logs" / f"{name}.log", ready_s=10
        )

    return make


def notes(tmp_path):
    return (tmp_path / "notes").read_text().splitlines()


def until(condition, deadline_s=10):
    ends = time.monotonic() + deadline_s
    return lambda: condition() or time.monotonic() > ends


def test_children_start_in_order_and_stop_in_the_opposite(make_child, tmp_path):
    events = []
    children = [make_child("registry"), make_child("extractor")]
    supervisor = Supervisor(children, grace_s=2, on_event=lambda *event: events.append(event))

    supervisor.start(lambda: False)
    supervisor.stop()

    started = ["registry started ", "extractor started registry=127.0.0.1:1"]
    assert notes(tmp_path) == [*started, "extractor stopped", "registry stopped"]
    assert ("registry", "ready at 127.0.0.1:1") in events


def test_a_crashed_child_is_started_again_at_its_address(make_child, tmp_path):
    children = [make_child("registry", "crashes"), make_child("extractor")]
    supervisor = Supervisor(children, grace_s=2, on_event=lambda *_: None, first_backoff_s=0.1)

    supervisor.start(lambda: False)
    supervisor.run(until(lambda: children[0].n_crashes == 1 and children[0].ready))
    supervisor.stop()

    assert children[0].n_crashes == 1
    assert sum(line.startswith("registry started") for line in notes(tmp_path)) == 2
    assert sum(line.startswith("extractor started") for line in notes(tmp_path)) == 1


def test_a_child_that_never_gets_ready_shows_its_log(make_child):
    supervisor = Supervisor([make_child("registry", "fails")], grace_s=2, on_event=lambda *_: None)

    with pytest.raises(StartFailed, match=r"exit code 3(.|\n)*port is taken"):
        supervisor.start(lambda: False)
    supervisor.stop()


def test_a_child_that_does_not_stop_is_killed(make_child, tmp_path):
    child = make_child("registry", "stubborn")
    supervisor = Supervisor([child], grace_s=-2.8, on_event=lambda *_: None)

    supervisor.start(lambda: False)
    supervisor.stop()

    assert child.process.returncode == -signal.SIGKILL


def test_up_refuses_a_second_one_on_the_same_folder(tmp_path):
    import fcntl  # noqa: PLC0415

    with (tmp_path / "up.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        command = [sys.executable, "-m", "headrace_cli", "--json", "up", "--data-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 1
    error = json.loads(done.stderr)["error"]
    assert error["reason"] == "ALREADY_RUNNING"
    assert str(os.getpid()) in error["message"]


def test_pull_state_is_replaced_at_once(tmp_path):
    write_state(tmp_path, {"next_row": 1})
    write_state(tmp_path, {"next_row": 2})

    assert read_state(tmp_path) == {"next_row": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["pull.json"]
