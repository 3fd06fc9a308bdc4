"""One extractor per data folder, and folders that can't be used: real processes, and one sentence each."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import subprocess
import sys
import time

import pytest

from headrace_chassis.errors import FolderInvalid
from headrace_extractor.errors import AlreadyExists, NodeIdTaken, RegistryUnavailable
from headrace_extractor.node import node as node_module
from headrace_extractor.node.data_folder import boot_nonce, lock_data_folder
from headrace_extractor.node.node import Node

COMMAND = [
    *(sys.executable, "-m", "headrace_extractor", "--listen", "127.0.0.1:0", "--registry", "127.0.0.1:1"),
    *("--device", "cpu", "--spare-runners", "0", "--grace-s", "1"),
]


@contextlib.contextmanager
def serving(folder, ready):
    """An extractor that serves; its process."""
    command = [*COMMAND, "--data-dir", str(folder), "--ready-file", str(ready)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 50
            while not ready.exists():
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def refusal(*arguments):
    """What an extractor that does not start says, which is one error."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("extractor: "))
    return line


def test_a_second_extractor_on_a_data_folder_does_not_start_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "data"
    with serving(folder, tmp_path / "ready") as first:
        told = refusal("--data-dir", str(folder))
        first.kill()
        first.wait(10)

    assert f"process {first.pid}" in told
    assert "another --data-dir" in told
    (tmp_path / "ready").unlink()
    with serving(folder, tmp_path / "ready"):
        pass


def test_a_data_folder_that_can_not_be_used_is_one_sentence_that_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "activations").write_text("x")

    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing", tmp_path / "data"):
        assert "--data-dir" in refusal("--data-dir", str(folder))


def test_a_corpus_root_that_can_not_be_read_is_one_sentence_that_names_the_flag(tmp_path):
    assert "--corpus-root" in refusal("--data-dir", str(tmp_path / "d"), "--corpus-root", str(tmp_path / "nothing"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    with pytest.raises(FolderInvalid, match="without locks"):
        lock_data_folder(tmp_path)


def test_starts_on_one_folder_have_one_first_word_and_other_folders_another(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again, other = boot_nonce(tmp_path / "a"), boot_nonce(tmp_path / "a"), boot_nonce(tmp_path / "b")

    assert first != again
    assert first.partition(".")[0] == again.partition(".")[0] != other.partition(".")[0]


class Taken:
    """A registry in which another node has this one's id."""

    async def register(self, address, devices, machine):
        raise AlreadyExists("Another extractor, at h:1, is registered as node a and lives; take another --node-id.")


class AwayThenTaken(Taken):
    """A registry that is away at first."""

    def __init__(self):
        self.n_away = self.n_taken = 0

    async def register(self, address, devices, machine):
        if self.n_away < 5:
            self.n_away += 1
            raise RegistryUnavailable("away")
        self.n_taken += 1
        await super().register(address, devices, machine)


async def test_a_node_whose_registry_was_away_waits_as_long_for_its_id(monkeypatch):
    monkeypatch.setattr(node_module, "ID_WAIT_S", 0.2)
    monkeypatch.setattr(node_module, "RETRY_S", 0.05)
    registry = AwayThenTaken()

    with pytest.raises(NodeIdTaken):
        await Node(registry, None, lambda: (), environment={}).run(address="h:2")
    assert registry.n_taken > 2


async def test_a_node_whose_id_another_one_has_gives_up_with_the_flag(monkeypatch):
    monkeypatch.setattr(node_module, "ID_WAIT_S", 0.0)
    monkeypatch.setattr(node_module, "RETRY_S", 0.01)
    node = Node(Taken(), None, lambda: (), environment={})

    with pytest.raises(NodeIdTaken, match="--node-id"):
        await node.run(address="h:2")
