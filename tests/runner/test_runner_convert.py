"""Failures of a conversion; test_runner_smollm2.py converts a real file."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from headrace_extractor.errors import DiskFull, LoadFailed, ModelUnsupported
from headrace_extractor.runner.models import convert
from headrace_extractor.runner.models.new_folder import new_folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_missing_file_is_unsupported(tmp_path):
    with pytest.raises(ModelUnsupported, match="no file"):
        convert.convert_gguf(tmp_path / "none.gguf", tmp_path / "out", lambda *_: None)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all, but longer" * 100])
def test_file_that_is_no_gguf_leaves_nothing_behind(tmp_path, content):
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    with pytest.raises((ModelUnsupported, LoadFailed)):
        convert.convert_gguf(source, tmp_path / "out", lambda *_: None)

    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), LoadFailed),
        (SafetensorError("other"), LoadFailed),
        (ValueError("GGUF model with architecture abacus is not supported yet."), ModelUnsupported),
    ],
)
def test_error_while_writing_is_typed_and_leaves_nothing_behind(source, monkeypatch, error, kind):
    def fail(_source, folder, _on_progress):
        folder.mkdir()
        raise error

    monkeypatch.setattr(convert, "_convert", fail)
    with pytest.raises(kind):
        convert.convert_gguf(source, source.with_name("out"), lambda *_: None)

    assert list(source.parent.iterdir()) == [source]


def test_finished_conversion_is_not_repeated(tmp_path):
    (tmp_path / "out").mkdir()

    convert.convert_gguf(tmp_path / "gone.gguf", tmp_path / "out", lambda *_: None)


def write_files(folder, text):
    folder.mkdir()
    (folder / "config.json").write_text(text)


def test_two_nodes_that_make_one_folder_leave_each_other_alone_and_the_first_names_it(tmp_path):
    with new_folder(tmp_path / "out") as first:
        write_files(first, "first")
        with new_folder(tmp_path / "out") as second:
            write_files(second, "second")
        assert (first / "config.json").read_text() == "first"

    assert (tmp_path / "out" / "config.json").read_text() == "second"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


LEAVE = """
import os, sys
from pathlib import Path
from headrace_extractor.runner.models.new_folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(100))
    os._exit(0)
"""


def die_while_making(target):
    """Ends like a killed process: nothing is cleared away."""
    subprocess.run([sys.executable, "-c", LEAVE, str(target)], check=True, timeout=30)


def test_what_a_dead_attempt_left_goes_when_the_next_one_begins(tmp_path):
    die_while_making(tmp_path / "out")
    die_while_making(tmp_path / "out-int8")
    left = sorted(path.name[:-17] for path in tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        assert sorted(path.name[:-17] for path in tmp_path.iterdir()) == left
        write_files(folder, "whole")

    assert left == [".out", ".out-int8"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert sorted(path.name[:-17] for path in tmp_path.iterdir() if path.name != "out") == [".out-int8"]


def test_where_the_disk_knows_no_locks_all_attempts_stay(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    die_while_making(tmp_path / "out")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with new_folder(tmp_path / "out") as first:
        write_files(first, "first")
        monkeypatch.undo()
        with new_folder(tmp_path / "out") as second:
            write_files(second, "second")
        assert (first / "config.json").read_text() == "first"

    assert (tmp_path / "out" / "config.json").read_text() == "second"
