"""A small hub of datasets on real HTTP: the part of the protocol that streaming uses, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

DATASET_SHA = "89abcdef0123456789abcdef0123456789abcdef"
REPO = "owner/words"


@dataclass
class DatasetHub:
    """One dataset, `owner/words`, on branch `main`, from the files of a folder."""

    folder: Path
    token: str = ""  # When set, requests need this token.
    gated: bool = False
    fail_status: int = 0  # While set, every request is answered with it.
    n_cuts: int = 0  # This many bodies of files are cut in the middle.
    stall: threading.Event = field(default_factory=threading.Event)  # While set, bodies stop in the middle.
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, authorization
    server: ThreadingHTTPServer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        home = str(self.folder.parent / "home")
        return {**keep, "HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HOME": home}

    def add(self, name: str, content: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def entries(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": str(path.relative_to(self.folder)), "size": path.stat().st_size, "oid": oid(path)}
            for path in files
        ]


def oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def handler_of(hub: DatasetHub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one small class of short methods.
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            path = path.replace("%2F", "/")
            authorization = self.headers.get("authorization", "")
            with hub.lock:
                hub.seen.append((self.command, self.path, authorization))
            api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
            if hub.fail_status:
                self.answer(hub.fail_status)
            elif not (path.startswith((api + "/", files)) or path == api):
                self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            elif hub.token and authorization != f"Bearer {hub.token}":
                self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
            elif path.startswith(files):
                revision, _, name = path.removeprefix(files).partition("/")
                self.serve(revision, name)
            else:
                self.describe(path.removeprefix(api))

        def describe(self, what: str) -> None:
            kind, _, rest = what.removeprefix("/").partition("/")
            revision, _, folder = rest.partition("/")
            if kind and revision not in ("main", DATASET_SHA):
                self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            elif kind in ("", "revision"):
                siblings = [{"rfilename": entry["path"]} for entry in hub.entries()]
                info = {"id": REPO, "sha": DATASET_SHA, "private": False, "tags": [], "siblings": siblings}
                self.json(
                    info | {"gated": "auto" if hub.gated else False, "disabled": False, "downloads": 0, "likes": 0}
                )
            elif kind == "tree":
                inside = [e for e in hub.entries() if not folder or str(e["path"]).startswith(folder + "/")]
                self.json(inside) if inside else self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            elif kind == "paths-info":
                wanted = json.loads(self.body)["paths"]
                self.json([entry for entry in hub.entries() if entry["path"] in wanted])
            else:
                self.answer(404)

        def serve(self, revision: str, name: str) -> None:
            file = hub.folder / name
            if hub.gated:
                self.answer(403, headers={"X-Error-Code": "GatedRepo"})
            elif revision not in ("main", DATASET_SHA):
                self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            elif not file.is_file():
                self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            else:
                self.send_file(file)

        def send_file(self, file: Path) -> None:
            body = file.read_bytes()
            headers = {"X-Repo-Commit": DATASET_SHA, "Accept-Ranges": "bytes", "ETag": f'"{oid(file)}"'}
            first, _, last = self.headers.get("range", "").removeprefix("bytes=").partition("-")
            if first:
                start, end = int(first), int(last) + 1 if last else len(body)
                headers["Content-Range"] = f"bytes {start}-{min(end, len(body)) - 1}/{len(body)}"
                self.answer(206, body[start:end], headers, faulty=True)
            else:
                self.answer(200, body, headers, faulty=True)

        def json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(
            self, code: int, body: bytes = b"", headers: dict[str, str] | None = None, *, faulty: bool = False
        ) -> None:
            self.send_response(code)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            with hub.lock:
                cut = faulty and hub.n_cuts > 0
                hub.n_cuts -= cut
            half = len(body) // 2
            self.send(body[:half])
            while faulty and hub.stall.is_set():
                time.sleep(0.02)
            if cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.send(body[half:])

        def send(self, body: bytes) -> None:
            try:
                self.wfile.write(body)
                self.wfile.flush()
            except OSError:
                self.close_connection = True

    return Handler


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def dataset_hub(tmp_path):
    hub = DatasetHub(tmp_path / "dataset")
    hub.folder.mkdir()
    hub.server = QuietServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield hub
    hub.stall.clear()
    hub.server.shutdown()
    hub.server.server_close()
