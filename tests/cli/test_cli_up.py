"""`headrace up` with the real servers."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from headrace_cli.processes.detached import holder_of
from headrace_cli.processes.only_one import only_one

CLI = [sys.executable, "-m", "headrace_cli", "--json"]
REGISTRY_FLAGS = [("--models-quota-bytes", "1000000"), ("--allow-pickle", "a/b"), ("--trust-remote-code", "c/d")]
EXTRACTOR_FLAGS = [("--device", "cpu"), ("--spare-runners", "0")]


@pytest.fixture
def running(tmp_path):
    """The process of `headrace up` on free ports. SIGHUP ends it also where the tests themselves run under nohup."""
    command = [*CLI, "up", "--data-dir", str(tmp_path), "--registry-listen", "127.0.0.1:0", "--grace-s", "5"]
    command += ["--extractor-listen", "127.0.0.1:0"]
    command += [word for flag, value in REGISTRY_FLAGS + EXTRACTOR_FLAGS for word in (flag, value)]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # A child inherits a signal that is ignored.
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(20)
    process.stdout.close()
    process.stderr.close()


def next_event(process, service, pattern):
    """Reads events until one matches; returns the match."""
    for line in process.stdout:
        event = json.loads(line)
        if event["service"] == service and (found := re.search(pattern, event["event"])):
            return found
    raise AssertionError(process.stderr.read())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_up_starts_both_restarts_a_killed_one_and_stops_both(running):
    registry_pid = int(next_event(running, "registry", r"process (\d+)")[1])
    registry = next_event(running, "registry", r"ready at (.+)")[1]
    extractor_pid = int(next_event(running, "extractor", r"process (\d+)")[1])
    first = next_event(running, "extractor", r"ready at (.+)")[1]
    words = Path(f"/proc/{registry_pid}/cmdline").read_text().split("\0")
    words_of_extractor = Path(f"/proc/{extractor_pid}/cmdline").read_text().split("\0")

    os.kill(extractor_pid, signal.SIGKILL)
    extractor_pid = int(next_event(running, "extractor", r"starting, process (\d+)")[1])
    again = next_event(running, "extractor", r"ready at (.+)")[1]
    listed = devices(registry, again)
    running.send_signal(signal.SIGTERM)
    code = running.wait(30)

    assert code == 0
    assert again == first
    assert set(REGISTRY_FLAGS) <= set(pairwise(words))
    assert set(EXTRACTOR_FLAGS) <= set(pairwise(words_of_extractor))
    assert [(node["state"], node["address"]) for node in listed] == [("ALIVE", again)]
    assert not alive(registry_pid)
    assert not alive(extractor_pid)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_up_stops_both_when_its_terminal_is_gone(running, number):
    registry_pid = int(next_event(running, "registry", r"process (\d+)")[1])
    extractor_pid = int(next_event(running, "extractor", r"process (\d+)")[1])
    next_event(running, "extractor", r"ready at (.+)")
    running.stdout.close()
    running.stderr.close()

    running.send_signal(number)
    running.wait(30)

    assert not alive(registry_pid)
    assert not alive(extractor_pid)


def test_up_in_the_background_answers_when_both_are_ready_and_down_stops_it(tmp_path):
    data_dir = ["--data-dir", str(tmp_path)]
    options = ["--registry-listen", "127.0.0.1:0", "--extractor-listen", "127.0.0.1:0", "--grace-s", "5"]
    options += ["--device", "cpu", "--spare-runners", "0"]
    try:
        started = run("up", *data_dir, *options, "--detach")
        again = run("up", *data_dir, *options, "--detach", code=1)
        nodes = run("--registry", started["registry"], "devices")["nodes"]
    finally:
        stopped = run("down", *data_dir)

    assert [node["address"] for node in nodes] == [started["extractor"]]
    assert again["error"]["reason"] == "ALREADY_RUNNING"
    assert stopped == {"stopped": True, "pid": int(started["pid"])}
    assert run("down", *data_dir) == {"stopped": False}


def test_a_start_in_the_background_makes_a_private_data_folder(tmp_path):
    folder = tmp_path / "new"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run("up", "--data-dir", str(folder), "--registry-listen", address, "--detach", code=1)

    assert not folder.stat().st_mode & 0o066  # As root, another user may pass through: the database.


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_down_ends_no_process_but_headrace_up_of_this_machine(tmp_path, host):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(50)", "up"])
    try:
        with (tmp_path / "up.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(f"{other.pid} {host}")
            lock.flush()
            refused = run("down", "--data-dir", str(tmp_path), code=5)["error"]

        assert refused["message"].startswith(f"{tmp_path} is held by process {other.pid} on {host}")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_lock_file_names_no_process_after_its_end(tmp_path):
    lock = tmp_path / "up.lock"
    with only_one(lock, busy="", remedy=""):
        held = holder_of(lock)

    assert (held.pid, held.host) == (os.getpid(), socket.gethostname())
    assert lock.read_text() == ""


def test_a_taken_port_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = run("up", "--data-dir", str(tmp_path), "--registry-listen", address, code=1)["error"]
        server = [*CLI, "serve", "registry", "--data-dir", str(tmp_path), "--listen", address]
        alone = subprocess.run(server, capture_output=True, text=True, timeout=50, check=False)

    sentence = (
        f"registry: Can't listen on {address}: it is in use, or no address of this machine; choose another --listen."
    )
    assert refused["message"] == sentence
    assert "--registry-listen" in refused["remedy"]
    assert "headrace serve registry" in refused["remedy"]  # `up` itself has no --listen, --insecure or --tls-cert.
    assert alone.returncode == 2
    assert [line for line in alone.stderr.splitlines() if not line.startswith("{")] == [sentence]


def run(*arguments, code=0):
    """Runs `headrace --json`; returns what it printed."""
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout if code == 0 else done.stderr.splitlines()[-1])


def devices(registry, address):
    """Returns the nodes, as soon as the node at `address` is alive."""
    for _ in range(20):
        done = subprocess.run(
            [*CLI, "--registry", registry, "devices"], capture_output=True, text=True, timeout=30, check=True
        )
        nodes = json.loads(done.stdout)["nodes"]
        if any(node["state"] == "ALIVE" and node["address"] == address for node in nodes):
            return nodes
        time.sleep(0.3)
    raise AssertionError(nodes)
