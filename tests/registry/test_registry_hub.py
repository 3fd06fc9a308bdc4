"""Hub downloads against a small hub of our own that speaks the part of the protocol huggingface_hub uses."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from fix_postgres import running_registry
from fix_registry import until, until_state, write_model
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb

from registry_service.errors import HubGated, HubNotFound, HubUnavailable, ModelUnsupported
from registry_service.hub.client import HubClient
from registry_service.hub.events import Event, Job

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repo, `owner/tiny`, on branch `main`, from the files of a folder."""

    folder: Path
    slow: threading.Event = field(default_factory=threading.Event)
    gated: bool = False
    tokens: list[str] = field(default_factory=list)
    server: ThreadingHTTPServer | None = None

    @property
    def environment(self) -> dict[str, str]:
        assert self.server is not None
        endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        home = str(self.folder.parent / "home")
        return {**keep, "HF_ENDPOINT": endpoint, "HF_HOME": home, "HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one small class of many short methods.
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.tokens.append(self.headers.get("authorization", ""))
            path = self.path.split("?")[0]
            if not path.startswith(("/api/models/owner/tiny", "/owner/tiny/resolve/")):
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif hub.gated:
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif path.startswith("/api/"):
                self.describe(path)
            else:
                self.serve(path.rsplit("/", 1)[-1])

        def describe(self, path: str) -> None:
            revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
            if "/tree/" in path:
                revision = path.rpartition("/tree/")[2]
            if revision not in ("main", SHA):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            files = sorted(hub.folder.iterdir())
            if "/tree/" in path:
                listing = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in files]
                self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
                return
            siblings = [{"rfilename": f.name, "size": f.stat().st_size, "blobId": etag(f)} for f in files]
            info = {
                "id": "owner/tiny",
                "modelId": "owner/tiny",
                "sha": SHA,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def serve(self, name: str) -> None:
            file = hub.folder / name
            if not file.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            self.answer(200, file.read_bytes(), {"X-Repo-Commit": SHA, "ETag": f'"{etag(file)}"'})

        def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.slow.is_set() and len(body) > 1000:
                self.wfile.write(body[:500])
                self.wfile.flush()
                while hub.slow.is_set():
                    time.sleep(0.02)
                body = body[500:]
            self.wfile.write(body)

    return Handler


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(write_model(tmp_path / "repo"))
    (made.folder / "README.md").write_text("not fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(made))
    server.daemon_threads = True
    made.server = server
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield made
    made.slow.clear()
    server.shutdown()
    server.server_close()
    thread.join(5)


def job(tmp_path: Path, **fields: str) -> Job:
    values = {"repo_id": "owner/tiny", "revision": "main", "models_dir": str(tmp_path / "models"), "name": "tiny"}
    return Job(**{**values, **fields})


async def fetched(client: HubClient, wanted: Job) -> list[Event]:
    async with aclosing(client.fetch(wanted)) as events:
        return [event async for event in events]


async def test_a_branch_is_resolved_to_a_commit_and_only_model_files_come(hub, tmp_path):
    events = await fetched(HubClient(hub.environment), job(tmp_path, token="hf_secret"))
    folder = Path(events[-1].path)

    assert [events[0].kind, events[-1].kind] == ["resolved", "done"]
    assert (events[-1].commit_sha, folder.name) == (SHA, f"tiny-{SHA[:12]}")
    assert visible_names(folder) == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert (folder / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert "Bearer hf_secret" in hub.tokens


async def test_what_the_hub_refuses_is_told_apart(hub, tmp_path):
    client = HubClient(hub.environment)
    with pytest.raises(HubNotFound, match="owner/other"):
        await fetched(client, job(tmp_path, repo_id="owner/other"))
    with pytest.raises(HubNotFound, match="nowhere"):
        await fetched(client, job(tmp_path, revision="nowhere"))
    hub.gated = True
    with pytest.raises(HubGated, match="token"):
        await fetched(client, job(tmp_path))


async def test_a_hub_that_is_down_or_switched_off_is_unavailable(hub, tmp_path):
    down = {**hub.environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    with pytest.raises(HubUnavailable) as caught:
        await fetched(HubClient(down), job(tmp_path))
    assert caught.value.retry_after_s
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        await fetched(HubClient({**hub.environment, "HF_HUB_OFFLINE": "1"}), job(tmp_path))


async def test_a_repo_without_safetensors_is_unsupported(hub, tmp_path):
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match="save_pretrained"):
        await fetched(HubClient(hub.environment), job(tmp_path))


async def test_a_download_that_brings_nothing_is_given_up(hub, tmp_path):
    hub.slow.set()
    with pytest.raises(HubUnavailable, match="no byte"):
        await fetched(HubClient(hub.environment, stall_s=3.0), job(tmp_path))


async def test_cancelling_kills_the_download_and_preparing_again_completes_it(hub, database_url, tmp_path):
    hub.slow.set()
    async with running_registry(database_url, tmp_path / "data", environment=hub.environment) as registry:
        stubs = registry.stubs.models
        source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny"))
        await stubs.RegisterModel(pb.RegisterModelRequest(model=model_pb2.Model(source=source)))
        await stubs.PrepareModel(pb.PrepareModelRequest(model_id="tiny"))
        async for event in stubs.WatchModel(pb.WatchModelRequest(model_id="tiny"), timeout=30):
            if event.model.commit_sha:
                break
        cancelled = (await stubs.CancelPreparation(pb.CancelPreparationRequest(model_id="tiny"))).model
        await until(lambda: not download_children())
        hub.slow.clear()
        await stubs.PrepareModel(pb.PrepareModelRequest(model_id="tiny", hub_token="hf_secret"))
        model = await until_state(registry.stubs, "tiny", model_pb2.MODEL_STATE_READY, timeout_s=30)

    assert cancelled.state == model_pb2.MODEL_STATE_REGISTERED
    assert (model.commit_sha, model.n_parameters) == (SHA, 336)
    assert model.files_path == str(tmp_path / "data" / "models" / f"tiny-{SHA[:12]}")


def download_children() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if c.status() != psutil.STATUS_ZOMBIE and "hub.download" in " ".join(c.cmdline())]


def visible_names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}
