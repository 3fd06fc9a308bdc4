"""`headrace pull` that is interrupted, killed or doubled: no row is lost, mixed up or made up."""

import errno
import fcntl
import json
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from fix_client import EXTRACTION_ID, HOOKPOINT, Fault
from headrace_cli.app import app
from headrace_cli.settings import Defaults
from safetensors.numpy import load_file
from typer.testing import CliRunner


@pytest.fixture
def pull(registry_host, tmp_path):
    """Pulls one column into `out`."""

    def run(*arguments, out="rows"):
        return CliRunner().invoke(
            app,
            ["--json", "pull", EXTRACTION_ID, "--columns", HOOKPOINT, "--out", str(tmp_path / out), *arguments],
            obj=Defaults(registry=registry_host.address),
        )

    return run


@pytest.fixture
def pulling(registry_host, tmp_path):
    """A process that pulls one column into `out`, and has begun to."""

    @contextmanager
    def run(out="rows"):
        command = [sys.executable, "-m", "headrace_cli", "--registry", registry_host.address, "pull", EXTRACTION_ID]
        command += ["--columns", HOOKPOINT, "--out", str(tmp_path / out)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr.readline().startswith("pull ")
                yield process
            finally:
                process.kill()

    return run


def error_of(result):
    assert result.exit_code != 0, result.stdout
    return json.loads(result.stderr.splitlines()[-1])["error"]


def assert_all_rows_in(path, extractor):
    file = path if path.suffix else path / f"{HOOKPOINT}.safetensors"
    np.testing.assert_array_equal(load_file(file)[HOOKPOINT], extractor.column(HOOKPOINT))


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
