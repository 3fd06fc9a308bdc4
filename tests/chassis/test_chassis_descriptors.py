"""Servers open as many files as they may, whatever the limit they were started with."""

import json
import resource
import subprocess
import sys

import pytest

# With these flags the servers end before they listen.
REFUSED = {
    "headrace_registry": ["--models-root", "/nowhere"],
    "headrace_extractor": ["--listen", "0.0.0.0:0"],
}


@pytest.mark.parametrize("server", REFUSED)
def test_a_server_raises_its_limit_of_open_files_to_the_most_it_may_have(server, tmp_path):
    command = [sys.executable, "-m", server, "--data-dir", str(tmp_path), *REFUSED[server]]
    lowered = ["sh", "-c", 'ulimit -Sn 200 && exec "$@"', "sh", *command]

    done = subprocess.run(lowered, capture_output=True, text=True, timeout=50, check=False)

    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    told = next(line for line in lines if "max_files" in line)
    assert (told["max_files_before"], told["max_files"]) == (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
