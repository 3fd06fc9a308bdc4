"""Ways to a server: certificates, HTTP proxies, sockets that note what comes in, and servers at any address.

`0.0.0.0:PORT` leads to a listener on loopback too, and counts as an address of another machine: no test has to listen
beyond loopback.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from concurrent import futures

import grpc
import pytest

from fix_client import _ADDERS

ELSEWHERE = "0.0.0.0"


def elsewhere(port):
    """The address of a listener on loopback as if it were on another machine."""
    return f"{ELSEWHERE}:{port}"


@pytest.fixture(scope="session")
def make_identity(tmp_path_factory):
    """Makes a key and a self-signed certificate for localhost, 127.0.0.1 and 0.0.0.0; returns their files."""

    def make():
        folder = tmp_path_factory.mktemp("tls")
        cert, key = folder / "cert.pem", folder / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:0.0.0.0"]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        return cert, key

    return make


@pytest.fixture(scope="session")
def identity(make_identity):
    return make_identity()


@pytest.fixture
def serve_at():
    """Serves a scripted servicer at an address, with TLS if there is an identity; returns the port."""
    servers = []

    def serve(servicer, address, identity=None):
        server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        for kind, add in _ADDERS.items():
            if isinstance(servicer, kind):
                add(servicer, server)
        if identity is None:
            port = server.add_insecure_port(address)
        else:
            cert, key = (file.read_bytes() for file in identity)
            port = server.add_secure_port(address, grpc.ssl_server_credentials([(key, cert)]))
        server.start()
        servers.append(server)
        return port

    yield serve
    for server in servers:
        server.stop(0).wait(5)


class Listener:
    """Accepts connections on loopback and hands each to `serve`, in a thread of its own."""

    def __init__(self):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets = []
        self.port = self._listening.getsockname()[1]
        self.received = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, sock):
        """Notes all that comes in."""
        while data := sock.recv(65536):
            self.received += data

    def close(self):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for each in (self._listening, *self._sockets):
            each.close()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self._sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError):
            self.serve(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class HangingUp(Listener):
    """Notes the first bytes that come in, and hangs up."""

    def serve(self, sock):
        self.received += sock.recv(65536)


class HttpProxy(Listener):
    """An HTTP proxy: connects the caller with the server it names, or answers with a page of its own."""

    def __init__(self, refusal=b""):
        super().__init__()
        self.refusal = refusal
        self.asked = []

    def serve(self, sock):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte:
                return
            head += byte
        self.asked.append(head.decode().split("\r\n"))
        if self.refusal:
            sock.sendall(self.refusal)
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port)), 5) as far:
            far.settimeout(None)
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pass_on, args=(far, sock), daemon=True)
            back.start()
            _pass_on(sock, far)
            back.join(5)


def _pass_on(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def listeners():
    """Starts listeners and proxies: `listeners(HttpProxy, b"...")`."""
    started = []

    def start(kind=Listener, *arguments):
        started.append(kind(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def proxied(monkeypatch):
    """Names a proxy in the environment, as `http_proxy`, and nothing else."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    def name(port, **more):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        for key, value in more.items():
            monkeypatch.setenv(key, value)

    return name
