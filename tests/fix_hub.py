"""A small hub on real HTTP: the part of the protocol that downloads use, with faults that tests choose.

A fault of `hub.faults` serves the next `times` requests with a path that ends with `on`, and is then used up.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fix_registry import write_model

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """A fault of an answer. `on`: the end of the request's path; `times`: the number of answers."""

    on: str = ""
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1  # Bytes of the body, then the connection is reset.
    truncate_to: int = -1  # Bytes of the body, with a Content-Length that hides the rest.
    corrupt: bool = False
    stall_s: float = 0.0  # Silence after `stall_after` bytes, then the end.
    stall_after: int = 500
    drip_bytes: int = 0  # Bytes sent every 50 ms.


@dataclass(frozen=True)
class Seen:
    """One request."""

    method: str
    path: str
    range: str
    authorization: str
    port: int


@dataclass
class Hub:
    """One repo, `owner/tiny`, on branch `main`, from the files of a folder. Files above `lfs_bytes` are LFS files."""

    folder: Path
    lfs_bytes: int = 1000
    commit: str = SHA
    token: str = ""  # When set, the repo needs this token.
    gated: bool = False
    cdn: bool = False  # Files are served from another port, after a redirect.
    etag: bool = True
    ranges: bool = True
    held: threading.Event = field(default_factory=threading.Event)  # While set, bodies stop after 500 bytes.
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)  # Further names in the listing.
    card: dict[str, object] = field(default_factory=dict)  # What the listing says of the model's card.
    sent_bytes: dict[str, int] = field(default_factory=dict)
    servers: list[ThreadingHTTPServer] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_address[1]}"

    @property
    def cdn_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.servers[1].server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        home = str(self.folder.parent / "home")
        return {**keep, "HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def take_fault(self, path: str) -> Fault:
        with self.lock:
            for index, fault in enumerate(self.faults):
                if path.endswith(fault.on):
                    if fault.times > 1:
                        self.faults[index] = Fault(**{**vars(fault), "times": fault.times - 1})
                    else:
                        del self.faults[index]
                    return fault
        return Fault()

    def requests(self, ending: str) -> list[Seen]:
        with self.lock:
            return [each for each in self.seen if each.path.endswith(ending) and each.method == "GET"]

    def served_bytes(self, name: str) -> int:
        with self.lock:
            return self.sent_bytes.get(name, 0)


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def git_sha1_of(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one small class of many short methods.
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            port = self.server.server_address[1]
            authorization = self.headers.get("authorization", "")
            with hub.lock:
                hub.seen.append(Seen(self.command, path, self.headers.get("range", ""), authorization, port))
            self.fault = hub.take_fault(path)
            if self.fault.status:
                self.answer(self.fault.status, b"", self.fault.headers)
            elif path.startswith("/cdn/"):
                self.serve(path.rsplit("/", 1)[-1])
            elif not path.startswith(("/api/models/owner/tiny", "/owner/tiny/resolve/")):
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif hub.token and authorization != f"Bearer {hub.token}":
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif hub.gated and not path.startswith("/api/"):
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif path.startswith("/api/"):
                self.describe(path)
            elif hub.cdn:
                location = f"{hub.cdn_endpoint}/cdn/{path.rsplit('/', 1)[-1]}?signature=s3cret"
                self.answer(302, b"", {"Location": location})
            else:
                self.serve(path.rsplit("/", 1)[-1])

        def describe(self, path: str) -> None:
            revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
            if revision not in ("main", hub.commit):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": hub.commit, "private": False, "tags": []}
            siblings = [self.sibling(file) for file in sorted(hub.folder.iterdir())]
            info["cardData"] = hub.card
            info["siblings"] = siblings + [{"rfilename": name, "size": 10} for name in hub.extra]
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def sibling(self, file: Path) -> dict[str, object]:
            size = file.stat().st_size
            found = {"rfilename": file.name, "size": size, "blobId": git_sha1_of(file)}
            if size > hub.lfs_bytes:
                found["lfs"] = {"sha256": sha256_of(file), "size": size, "pointerSize": 134}
            return found

        def serve(self, name: str) -> None:
            file = hub.folder / name
            if not file.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            body = file.read_bytes()
            if self.fault.corrupt:
                body = bytes([body[0] ^ 1]) + body[1:]
            headers = {"X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            if hub.etag:
                headers["ETag"] = f'"{git_sha1_of(file)}"'
            first = self.headers.get("range", "").removeprefix("bytes=").partition("-")[0]
            if first and hub.ranges:
                start = int(first)
                if start >= len(body):
                    self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                self.answer(206, body[start:], headers, name)
                return
            self.answer(200, body, headers, name)

        def answer(self, code: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
            fault = self.fault
            if fault.truncate_to >= 0:
                body = body[: fault.truncate_to]
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault.cut_after >= 0:
                self.send(body[: fault.cut_after], name)
                self.reset()
            elif fault.stall_s:
                self.send(body[: fault.stall_after], name)
                time.sleep(fault.stall_s)
                self.reset()
            elif fault.drip_bytes:
                for start in range(0, len(body), fault.drip_bytes):
                    self.send(body[start : start + fault.drip_bytes], name)
                    time.sleep(0.05)
            elif hub.held.is_set() and len(body) > 1000:
                self.send(body[:500], name)
                while hub.held.is_set():
                    time.sleep(0.02)
                self.send(body[500:], name)
            else:
                self.send(body, name)

        def send(self, body: bytes, name: str) -> None:
            try:
                self.wfile.write(body)
                self.wfile.flush()
            except OSError:
                self.close_connection = True
                return
            with hub.lock:
                hub.sent_bytes[name] = hub.sent_bytes.get(name, 0) + len(body)

        def reset(self) -> None:
            """Breaks the connection in the middle of the body."""
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


class QuietServer(ThreadingHTTPServer):
    """Ignores broken connections: tests kill clients."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def start_hub(folder: Path) -> Hub:
    """Starts the hub and its CDN; `stop_hub` ends them."""
    hub = Hub(folder)
    for _ in range(2):
        server = QuietServer(("127.0.0.1", 0), handler_of(hub))
        hub.servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return hub


def stop_hub(hub: Hub) -> None:
    hub.held.clear()
    for server in hub.servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a tiny model of 200 KB of weights."""
    tensors = {"model.embed_tokens.weight": ("F32", (512, 96)), "model.norm.weight": ("BF16", (80,))}
    made = start_hub(write_model(tmp_path / "repo", tensors=tensors))
    (made.folder / "README.md").write_text("not fetched")
    yield made
    stop_hub(made)
