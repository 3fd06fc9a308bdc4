"""The command line finds its servers by options and by the environment: replicas, Unix sockets, certificates."""

import json
import os
import subprocess
import sys

import pytest

from fix_scripted_extractor import EXTRACTION_ID
from fix_scripted_registry import ScriptedRegistry

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def headrace(monkeypatch):
    """Runs the command in a process of its own; environment variables as keywords."""

    def run(*arguments, **environment):
        command = [sys.executable, "-m", "headrace_cli", "--json", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=50, check=False, env={**os.environ, **environment}
        )

    return run


def test_replicas_come_from_the_environment(headrace, hosts):
    host = hosts(ScriptedRegistry())
    host.servicer.add_node("n1", "127.0.0.1:1")

    done = headrace("devices", HEADRACE_REGISTRY=f"127.0.0.1:9,{host.address}", http_proxy="http://127.0.0.1:9")

    assert [node["id"] for node in json.loads(done.stdout)["nodes"]] == ["n1"], done.stderr


def test_all_of_it_goes_over_unix_sockets_with_tls_and_a_token(
    headrace, serve_at, scripted_extractor, identity, tmp_path
):
    registry = ScriptedRegistry()
    registry.add_node("n1", f"unix:{tmp_path}/x.sock")
    serve_at(scripted_extractor, f"unix:{tmp_path}/x.sock", identity)
    serve_at(registry, f"unix:{tmp_path}/r.sock", identity)

    done = headrace(
        *("--registry", f"unix:{tmp_path}/r.sock", "pull", EXTRACTION_ID, "--out", str(tmp_path / "rows")),
        HEADRACE_CA_FILE=str(identity[0]),
        HEADRACE_TOKEN=TOKEN,
    )

    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "rows").iterdir())
    assert scripted_extractor.metadata["StreamActivations"][0]["authorization"] == f"Bearer {TOKEN}"


def test_a_server_with_tls_tells_what_to_give(headrace, serve_at, identity):
    port = serve_at(ScriptedRegistry(), "127.0.0.1:0", identity)

    done = headrace("devices", "--registry", f"127.0.0.1:{port}")

    assert done.returncode == 4
    assert "HEADRACE_CA_FILE" in done.stderr
