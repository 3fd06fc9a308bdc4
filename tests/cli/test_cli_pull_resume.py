"""`headrace pull` that is interrupted, killed or started twice: no row is lost, mixed up or made up."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fix_scripted import unavailable
from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, Fault
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace_cli.app import app
from headrace_cli.pulling import column_files
from headrace_cli.pulling.tensor_files import ColumnFile, write_state
from headrace_cli.settings import Defaults
from headrace_client.reading.stream import ChunkStream


@pytest.fixture
def pull(registry_host, tmp_path):
    """Runs a pull of one column into `out`."""

    def run(*arguments, out="rows"):
        return CliRunner().invoke(
            app,
            ["--json", "pull", EXTRACTION_ID, "--columns", HOOKPOINT, "--out", str(tmp_path / out), *arguments],
            obj=Defaults(registry=registry_host.address),
        )

    return run


@pytest.fixture
def pulling(registry_host, tmp_path):
    """Starts a process that pulls one column into `out`; waits until it has some rows."""

    @contextmanager
    def run(out="rows"):
        command = [sys.executable, "-m", "headrace_cli", "--registry", registry_host.address, "pull", EXTRACTION_ID]
        command += ["--columns", HOOKPOINT, "--out", str(tmp_path / out)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = next(line for line in process.stderr if " 0 rows ·" not in line)
                assert line.startswith("pull "), line
                yield process
            finally:
                process.kill()

    return run


REFUSED = {"code": unavailable()["code"].INTERNAL, "reason": "INTERNAL", "message": "bug"}
N_BYTES_AT_192 = 4096 + 192 * 32  # The size of the file after a cut behind three chunks.


@pytest.fixture
def broken(pull, scripted_extractor, tmp_path):
    """The file of a pull that was cut off at row 192."""
    scripted_extractor.faults.append(Fault("cut", after=3, status=REFUSED))
    assert error_of(pull())["reason"] == "INTERNAL"
    file = tmp_path / "rows" / f"{HOOKPOINT}.safetensors.part"
    assert file.stat().st_size == N_BYTES_AT_192
    return file


def error_of(result):
    assert result.exit_code != 0, result.stdout
    return json.loads(result.stderr.splitlines()[-1])["error"]


def assert_all_rows_in(path, extractor):
    file = path if path.suffix else path / f"{HOOKPOINT}.safetensors"
    np.testing.assert_array_equal(load_file(file)[HOOKPOINT], extractor.column(HOOKPOINT))


@pytest.mark.parametrize("columns", [HOOKPOINT, f"token_id,{HOOKPOINT}"])
@pytest.mark.parametrize("out", ["rows", "rows.safetensors"])
def test_a_crash_at_any_point_leaves_a_pull_that_goes_on_or_is_finished(
    pull, scripted_extractor, tmp_path, monkeypatch, out, columns
):
    folder = tmp_path / "first"
    with monkeypatch.context() as patch:
        crashed = left_by_crashes(patch, folder)
        assert pull("--columns", columns, out=f"first/{out}").exit_code == 0
    assert len(crashed) > 5

    for copy in crashed:
        again = pull("--columns", columns, out=copy / out)
        assert again.exit_code == 0, (copy, again.stderr)
        assert_all_rows_in(copy / out, scripted_extractor)
        assert [path.name for path in copy.iterdir()] == [out]


def left_by_crashes(patch, folder):
    """Copies `folder` before each step on its files; returns the list of the copies' paths."""
    copies = []

    def copying(step):
        def run(*args, **options):
            copies.append(folder.with_name(f"left-{len(copies)}"))
            shutil.copytree(folder, copies[-1])
            return step(*args, **options)

        return run

    for step in ("fsync", "replace", "rename", "unlink", "rmdir"):
        patch.setattr(os, step, copying(getattr(os, step)))
    return copies


@pytest.mark.parametrize("step", [(ChunkStream, "__exit__"), (ColumnFile, "finish")])
def test_a_pull_that_has_all_rows_is_finished_without_a_stream(pull, scripted_extractor, tmp_path, monkeypatch, step):
    """A WINDOW set may hold no row any more after its stream was closed at the end."""
    with monkeypatch.context() as patch:
        patch.setattr(*step, lambda *_: 1 / 0)
        assert error_of(pull())["reason"] == "BUG"

    assert pull().exit_code == 0

    assert len(scripted_extractor.calls["StreamActivations"]) == 1
    assert_all_rows_in(tmp_path / "rows", scripted_extractor)


@pytest.mark.parametrize("columns", [HOOKPOINT, f"token_id,{HOOKPOINT}"])
@pytest.mark.parametrize("out", ["rows", "rows.safetensors"])
def test_a_pull_of_an_extraction_that_was_cancelled_leaves_only_files_that_open(
    pull, scripted_extractor, tmp_path, out, columns
):
    cancelled = {
        "code": unavailable()["code"].CANCELLED,
        "reason": "EXTRACTION_CANCELLED",
        "message": "it was cancelled",
    }
    scripted_extractor.faults.append(Fault("cut", after=3, status=cancelled))

    assert error_of(pull("--columns", columns, out=out))["reason"] == "EXTRACTION_CANCELLED"

    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix == ".safetensors"] == []
    assert sum(path.name.endswith(".safetensors.part") for path in left) == len(columns.split(","))
    assert pull("--columns", columns, out=out).exit_code == 0
    assert_all_rows_in(tmp_path / out, scripted_extractor)
    assert list(tmp_path.rglob("*.part")) == []


def test_what_another_pull_left_is_not_cleared_away(pull, tmp_path):
    assert pull("--rows", "0:10", out="rows.safetensors").exit_code == 0
    part = tmp_path / "rows.safetensors.part"
    part.mkdir()
    write_state(part, {"identity": {}, "next_row": 1})

    assert pull("--rows", "0:10", out="rows.safetensors").exit_code == 0

    assert part.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_interrupted_keeps_its_rows_and_says_how_to_go_on(
    pull, pulling, scripted_extractor, tmp_path, number
):
    scripted_extractor.faults.append(Fault("hang", after=3))
    with pulling() as process:
        file = tmp_path / "rows" / f"{HOOKPOINT}.safetensors.part"
        process.send_signal(number)
        rest = process.communicate(timeout=30)[1]
    kept = json.loads((tmp_path / "rows" / "pull.json").read_text())["next_row"]

    assert process.returncode == 130
    assert kept > 0
    assert file.stat().st_size == 4096 + kept * 32
    assert f"{kept} rows are kept" in rest
    assert "the same command goes on" in rest
    assert "Traceback" not in rest
    assert pull().exit_code == 0
    assert_all_rows_in(tmp_path / "rows", scripted_extractor)


@pytest.mark.parametrize("out", ["rows", "rows.safetensors"])
def test_a_second_pull_into_the_same_folder_is_refused_while_the_first_lives(
    pull, pulling, scripted_extractor, tmp_path, out
):
    scripted_extractor.faults.append(Fault("hang", after=3))
    with pulling(out) as first:
        refused = error_of(pull(out=out))
        first.kill()
        first.wait(30)

    assert refused["reason"] == "ALREADY_RUNNING"
    assert str(first.pid) in refused["message"]
    assert "--out" in refused["remedy"]
    assert pull(out=out).exit_code == 0
    assert_all_rows_in(tmp_path / out, scripted_extractor)


def test_pull_says_so_where_files_can_not_be_locked(pull, scripted_extractor, tmp_path, monkeypatch):
    """As on Lustre without its flock option."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    result = pull()

    assert result.exit_code == 0
    assert "can't be locked" in result.stderr
    assert_all_rows_in(tmp_path / "rows", scripted_extractor)


def shorten(file):
    with file.open("r+b") as opened:
        opened.truncate(N_BYTES_AT_192 - 1)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("harm", [shorten, remove])
def test_rows_that_went_missing_are_not_made_up(pull, broken, harm):
    state = (broken.parent / "pull.json").read_text()
    harm(broken)
    left = broken.read_bytes() if broken.exists() else None

    error = error_of(pull())

    assert error["reason"] == "ROWS_MISSING"
    assert broken.name in error["message"]
    assert str(broken.parent) in error["remedy"]
    assert (broken.read_bytes() if broken.exists() else None) == left
    assert (broken.parent / "pull.json").read_text() == state


@pytest.mark.parametrize("harm", [shorten, remove])
def test_a_finished_pull_whose_rows_went_missing_is_not_called_finished(pull, tmp_path, harm):
    assert pull().exit_code == 0
    harm(tmp_path / "rows" / f"{HOOKPOINT}.safetensors")

    assert error_of(pull())["reason"] == "ROWS_MISSING"


def test_a_finished_single_file_that_is_cut_short_is_not_called_finished(pull, tmp_path):
    assert pull(out="rows.safetensors").exit_code == 0
    shorten(tmp_path / "rows.safetensors")

    error = error_of(pull(out="rows.safetensors"))

    assert error["reason"] == "ROWS_MISSING"
    assert "remove it" in error["remedy"]


# -- a set that keeps a window of its rows -----------------------------------------------------------------------------

FOR_GOOD = (1 << 63) - 1


@pytest.fixture
def window(scripted_extractor):
    """The extractor, which sends at most two chunks beyond the released rows."""
    retention = scripted_extractor.extraction.spec.retention
    retention.kind, retention.window_bytes = ex_pb.RETENTION_KIND_WINDOW, 1 << 30
    scripted_extractor.window_rows = 128
    return scripted_extractor


def test_rows_of_a_window_are_not_released_before_they_are_on_disk(pull, window, tmp_path, monkeypatch):
    state, note = tmp_path / "rows" / "pull.json", window.note
    seen = []

    def look(method, request, context):
        if method == "ReleaseRows":
            seen.append((request.row, json.loads(state.read_text())["next_row"]))
        note(method, request, context)

    monkeypatch.setattr(window, "note", look)

    assert pull().exit_code == 0

    assert_all_rows_in(tmp_path / "rows", window)
    released = [(row, n_on_disk) for row, n_on_disk in seen if row != FOR_GOOD]
    assert max(row for row, _ in released) >= window.n_rows - window.window_rows
    assert all(row <= n_on_disk for row, n_on_disk in released)


def test_rows_of_a_window_go_to_disk_before_it_is_full(pull, window, tmp_path, monkeypatch):
    window.d = 2048
    window.extraction.spec.retention.window_bytes = window.window_rows * 4 * window.d
    monkeypatch.setattr(ChunkStream, "held_up", False)
    monkeypatch.setattr(column_files, "_SYNC_EVERY_S", float("inf"))

    assert pull().exit_code == 0

    assert_all_rows_in(tmp_path / "rows", window)


def test_an_interrupted_pull_comes_back_as_the_reader_that_is_waited_for(pull, window, tmp_path):
    window.faults.append(Fault("cut", after=2, status=REFUSED))
    assert error_of(pull())["reason"] == "INTERNAL"
    assert FOR_GOOD not in [call.row for call in window.calls["ReleaseRows"]]

    assert pull().exit_code == 0

    assert_all_rows_in(tmp_path / "rows", window)
    first, second = (call.reader for call in window.calls["StreamActivations"])
    assert first == second != ""
    assert FOR_GOOD in [call.row for call in window.calls["ReleaseRows"]]


def test_a_refused_pull_leaves_the_way_free_for_the_right_one(pull, registry_host, scripted_extractor, tmp_path):
    for out in ("rows", "rows.safetensors"):
        mistyped = CliRunner().invoke(
            app,
            ["--json", "pull", EXTRACTION_ID, "--columns", "blocks.0.hook_nowhere", "--out", str(tmp_path / out)],
            obj=Defaults(registry=registry_host.address),
        )

        right = pull(out=out)

        assert error_of(mistyped)["reason"] == "HOOKPOINT_NOT_FOUND"
        assert right.exit_code == 0, right.stderr
        file = tmp_path / "rows" / f"{HOOKPOINT}.safetensors" if out == "rows" else tmp_path / out
        np.testing.assert_array_equal(load_file(file)[HOOKPOINT], scripted_extractor.column(HOOKPOINT))


def test_rows_of_a_pull_that_was_cut_off_are_in_the_way_of_another(pull, broken):
    assert error_of(pull("--rows", "0:100"))["reason"] == "FILE_EXISTS"
    assert broken.stat().st_size == N_BYTES_AT_192
