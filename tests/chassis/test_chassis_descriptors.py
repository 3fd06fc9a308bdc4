"""Servers open as many files as they may, whatever the limit they were started with."""

import contextlib
import json
import resource
import socket
import subprocess
import sys
import time

import grpc
import pytest

from headrace.extractor.v1 import extraction_service_pb2 as service_pb
from headrace.extractor.v1 import extraction_service_pb2_grpc as service_grpc

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


def test_idle_connections_beyond_the_limit_of_open_files_end_no_extractor(tmp_path):
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "headrace_extractor", "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    command += ["--data-dir", str(tmp_path / "data"), "--registry", "127.0.0.1:9", "--device", "cpu"]
    command += ["--spare-runners", "0", "--grace-s", "2"]
    limited = ["sh", "-c", 'ulimit -n 300 && exec "$@"', "sh", *command]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(limited, stderr=log) as server,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(server.terminate)
        end = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < end
            assert server.poll() is None
            time.sleep(0.05)
        host, _, port = ready.read_text().rpartition(":")
        for _ in range(400):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=5))

        with grpc.insecure_channel(ready.read_text(), [("grpc.enable_http_proxy", 0)]) as channel:
            request = service_pb.ListExtractionsRequest()
            for _ in range(3):
                answer = service_grpc.ExtractionServiceStub(channel).ListExtractions(
                    request, timeout=20, wait_for_ready=True
                )
                assert list(answer.extractions) == []
                time.sleep(1.0)  # The node looks for its registry each second, and lists its devices for it.
        assert server.poll() is None
