"""Functions in child processes: answers, conversations, errors, limits, and the ends of everybody involved."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import fix_confined as functions
from fix_confined import NotThis, Refused
from headrace_chassis.confined.environment import hub_environment, without_secrets
from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.pool import Confined
from headrace_chassis.errors import ParsersBusy, ShuttingDown

MIB = 1024 * 1024
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems hold no limit on memory")


@pytest.fixture
def own():
    """Children whose zygote a test may end."""
    confined = Confined(errors=functions.ReadError, preload=("fix_confined",), at_once=1)
    yield confined
    confined.close()


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_answer_is_the_functions(confinement):
    assert confinement.run(functions.add, {"a": 2, "b": 3}, refuse=Refused) == 5


async def test_call_gives_the_answer_to_the_event_loop(confinement):
    answers = [confinement.call(functions.add, {"a": i, "b": 1}, refuse=Refused) for i in range(8)]

    assert await asyncio.gather(*answers) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_files_arrive_open(confinement, tmp_path):
    (tmp_path / "a").write_text("first")
    (tmp_path / "b").write_text("second")

    with (tmp_path / "a").open() as a, (tmp_path / "b").open() as b:
        files = (a.fileno(), b.fileno())
        assert confinement.run(functions.read_files, {}, files=files, refuse=Refused) == ["first", "second"]


def test_items_of_a_generator_come_in_order_and_then_its_answer(confinement):
    with confinement.open(functions.count_to, {"n": 3}, refuse=Refused) as talk:
        assert list(talk) == [0, 1, 2]
        assert talk.answer == "counted"


def test_each_question_gets_its_answer(confinement):
    with confinement.open(functions.double, {}, refuse=Refused) as talk:
        assert [talk.ask(number) for number in (1, 5, 21)] == [2, 10, 42]


def test_error_arrives_whole(confinement):
    with pytest.raises(NotThis, match="Not this one") as caught:
        confinement.run(functions.refuse_on_purpose, {}, refuse=Refused)

    error = caught.value
    found = (error.metadata, error.field, error.resource, error.retry_after_s)
    assert found == ({"line": "3"}, "spec", ("corpus", "a"), 1.5)


@pytest.mark.parametrize("function", [functions.recurse])
def test_other_exceptions_are_refusals(confinement, function):
    with pytest.raises(Refused, match="can't be read: RecursionError"):
        confinement.run(function, {}, refuse=Refused)


def test_panics_and_foreign_errors_are_refusals(confined_for_all):
    with pytest.raises(Refused, match="as a library in Rust does"):
        confined_for_all.run(functions.panic, {}, refuse=Refused)
    with pytest.raises(Refused, match="of another tree"):
        confined_for_all.run(functions.raise_other, {}, refuse=Refused)


def test_items_before_a_failure_arrive(confinement):
    found = []
    with (
        pytest.raises(Refused, match="KeyError"),
        confinement.open(functions.break_off, {"after": 2}, refuse=Refused) as talk,
    ):
        found.extend(talk)

    assert found == [] or found == [0, 1]


@LINUX
def test_memory_has_a_limit(confined_for_all):
    limits = Limits(memory_bytes=256 * MIB)
    assert confined_for_all.run(functions.take_memory, {"n_bytes": 64 * MIB}, refuse=Refused, limits=limits)

    with pytest.raises(Refused, match="takes more than 256 MiB of memory to read"):
        confined_for_all.run(functions.take_memory, {"n_bytes": 512 * MIB}, refuse=Refused, limits=limits)


def test_computing_has_a_limit(confined_for_all):
    with pytest.raises(Refused, match="takes longer than 1 s to read"):
        confined_for_all.run(functions.compute_for_ever, {}, refuse=Refused, limits=Limits(cpu_s=1))


def test_limit_of_computing_begins_anew_with_each_item(confined_for_all):
    limits = Limits(cpu_s=1)
    with confined_for_all.open(
        functions.compute_between_items, {"seconds": 0.75}, refuse=Refused, limits=limits
    ) as talk:
        assert list(talk) == [0, 1, 2]


def test_waiting_has_a_limit_that_is_no_refusal(confined_for_all):
    with pytest.raises(ParsersBusy, match="did not answer within 0 s"):
        confined_for_all.run(functions.sleep, {"seconds": 30}, refuse=Refused, limits=Limits(wall_s=0.2))


def test_output_has_a_limit(confined_for_all):
    limits = Limits(output_bytes=MIB)
    with pytest.raises(Refused, match="gives more than 1 MiB"):
        confined_for_all.run(functions.say_much, {"n_bytes": 2 * MIB}, refuse=Refused, limits=limits)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_fault_of_a_library_is_a_refusal(confined_for_all, number):
    with pytest.raises(Refused, match=f"breaks its parser .signal {int(number)}."):
        confined_for_all.run(functions.die, {"number": number}, refuse=Refused)


def test_child_that_the_system_kills_is_no_refusal(confined_for_all):
    with pytest.raises(ParsersBusy, match="for want of memory"):
        confined_for_all.run(functions.die, {"number": signal.SIGKILL}, refuse=Refused)


def test_child_that_ends_by_itself_is_a_refusal(confined_for_all):
    with pytest.raises(Refused, match="ended with status 5"):
        confined_for_all.run(functions.end_quietly, {}, refuse=Refused)


@LINUX
def test_child_has_no_environment_and_no_files_of_the_server(confined_for_all, monkeypatch, tmp_path):
    monkeypatch.setenv("DATABASE_URL", "postgres://user:secret@host/db")
    with (tmp_path / "of the server").open("w"):
        found = confined_for_all.run(functions.environment, {}, refuse=Refused)
        files = confined_for_all.run(functions.open_files, {}, refuse=Refused)

    assert not {"DATABASE_URL", "HOME", "HF_TOKEN"} & set(found)
    assert len([file for file in files if file.startswith("socket:")]) == 1
    assert not any("of the server" in file for file in files)


@LINUX
def test_child_ends_when_its_conversation_does(own):
    with own.open(functions.pid_then_sleep, {}, refuse=Refused) as talk:
        pid = next(iter(talk))
        assert Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"

    assert is_gone(pid)


@LINUX
def test_child_ends_with_its_server():
    tests = str(Path(functions.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    command = [sys.executable, "-c", "import fix_confined; fix_confined.serve()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as server:
        pid = int(server.stdout.readline())
        server.kill()

    assert is_gone(pid)


@LINUX
def test_zygote_that_was_killed_is_started_again(own):
    zygote = own.run(functions.parent_pid, {}, refuse=Refused)
    with own.open(functions.pid_then_sleep, {}, refuse=Refused) as talk:
        pid = next(iter(talk))
        os.kill(zygote, signal.SIGKILL)
        with pytest.raises(ParsersBusy, match="was lost; try again"):
            list(talk)

    assert is_gone(pid)
    assert own.run(functions.parent_pid, {}, refuse=Refused) != zygote


def test_close_ends_what_is_under_way(own):
    threading.Timer(0.3, own.close).start()
    begun = time.monotonic()

    with pytest.raises(ShuttingDown):
        own.run(functions.sleep, {"seconds": 30}, refuse=Refused)
    assert time.monotonic() - begun < 10
    with pytest.raises(ShuttingDown):
        own.run(functions.add, {"a": 1, "b": 1}, refuse=Refused)


async def test_close_ends_calls_that_wait_for_their_turn_likewise(own):
    turn = threading.Event()
    own._threads.submit(turn.wait)
    calls = [asyncio.create_task(own.call(functions.add, {"a": 1, "b": 1}, refuse=Refused)) for _ in range(3)]
    await asyncio.sleep(0)
    own.close()
    turn.set()

    ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
    assert [type(end) for end in ends] == [ShuttingDown] * 3


async def test_calls_beyond_the_queue_are_told_to_come_again(own, monkeypatch):
    monkeypatch.setattr("headrace_chassis.confined.pool._MAX_WAITING", 2)
    waiting = [asyncio.create_task(own.call(functions.sleep, {"seconds": 0.2}, refuse=Refused)) for _ in range(3)]
    await asyncio.sleep(0)

    with pytest.raises(ParsersBusy):
        await own.call(functions.add, {"a": 1, "b": 1}, refuse=Refused)
    await asyncio.gather(*waiting)
    assert await own.call(functions.add, {"a": 1, "b": 1}, refuse=Refused) == 2


@contextmanager
def no_descriptor_left():
    first_free = os.dup(0)
    os.close(first_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_calls_without_a_descriptor_left_are_told_to_come_again(own):
    with no_descriptor_left(), pytest.raises(ParsersBusy):
        own.run(functions.add, {"a": 1, "b": 1}, refuse=Refused)
    zygote = own.run(functions.parent_pid, {}, refuse=Refused)
    with no_descriptor_left(), pytest.raises(ParsersBusy):
        own.run(functions.add, {"a": 1, "b": 1}, refuse=Refused)

    assert own.run(functions.parent_pid, {}, refuse=Refused) == zygote


SERVERS = {
    "DATABASE_URL": "postgres://a:b@c/d",
    "PGPASSWORD": "b",
    "HEADRACE_TOKEN": "t",
    "AWS_SECRET_ACCESS_KEY": "k",
    "HF_TOKEN": "hf_1",
    "HF_HOME": "/cache",
    "https_proxy": "http://proxy",
    "PATH": "/bin",
    "SSL_CERT_FILE": "/ca",
    "CUDA_VISIBLE_DEVICES": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "LD_LIBRARY_PATH": "/lib",
    "api_key": "k",
}


def test_a_process_that_reaches_the_hub_gets_what_concerns_the_hub():
    found = set(hub_environment(SERVERS))

    assert found == {"HF_TOKEN", "HF_HOME", "https_proxy", "PATH", "SSL_CERT_FILE", "LD_LIBRARY_PATH"}


def test_a_runner_gets_all_but_the_secrets():
    secrets = {"DATABASE_URL", "PGPASSWORD", "HEADRACE_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "api_key"}

    assert set(SERVERS) - set(without_secrets(SERVERS)) == secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MYSQL_PWD", "b"),
        ("SQLALCHEMY_DATABASE_URI", "sqlite:///x"),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a"),
        ("GITHUB_PAT", "p"),
        ("OPENAI_APIKEY", "k"),
        ("REDIS_URL", "redis://:b@c/0"),
        ("https_proxy", "http://a:b@proxy:3128"),
    ],
)
def test_a_runner_gets_no_secret_of_an_unusual_name_or_in_an_address(name, value):
    assert without_secrets({name: value}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("PWD", "/w"), ("OLDPWD", "/"), ("PATH", "/bin"), ("PYTHONPATH", "/a"), ("https_proxy", "http://proxy:3128")],
)
def test_a_runner_gets_folders_paths_and_plain_addresses(name, value):
    assert without_secrets({name: value}) == {name: value}
