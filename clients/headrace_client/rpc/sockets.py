"""Connected sockets for streams of rows: over TCP or a Unix socket, through a proxy, with TLS."""

from __future__ import annotations

import re
import socket
import ssl

from headrace_client.rpc.addresses import Proxy, is_address, is_unix, split
from headrace_client.rpc.http2 import CallFailed

CONNECT_DEADLINE_S = 5.0
_MAX_ANSWER_BYTES = 64 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


def connect(address: str, roots: bytes | None, proxy: Proxy | None = None) -> socket.socket:
    """Connects to `host:port` or `unix:path`, with TLS if there are root certificates. Raises CallFailed."""
    if not is_address(address):
        raise CallFailed("UNAVAILABLE", f"can't connect: {address!r} is no host:port")
    unix, name = is_unix(address), "localhost" if is_unix(address) else split(address)[0]
    sock = None
    try:
        if unix:
            kind, _, path = address.partition(":")
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(CONNECT_DEADLINE_S)
            # gRPC's spellings: unix:relative, unix:/absolute, unix:///absolute; an abstract name has no file.
            sock.connect(f"\0{path}" if kind == "unix-abstract" else path.removeprefix("//"))
        else:
            sock = socket.create_connection((proxy.host, proxy.port) if proxy else split(address), CONNECT_DEADLINE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy:
                _ask_for_way(sock, address, proxy)
        if roots is None:
            return sock
        context = ssl.create_default_context(cadata=roots.decode("ascii", "ignore"))
        context.set_alpn_protocols(["h2"])
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # As strict as gRPC's other calls, not more.
        return context.wrap_socket(sock, server_hostname=name)
    except BaseException as exc:
        if sock is not None:
            sock.close()
        if isinstance(exc, OSError | ValueError):
            raise CallFailed("UNAVAILABLE", f"can't connect: {exc}") from exc
        raise


def _ask_for_way(sock: socket.socket, address: str, proxy: Proxy) -> None:
    """Has a proxy connect the socket with the server. Raises CallFailed if it answers anything but success."""
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    lines += [f"Proxy-Authorization: {proxy.authorization}"] if proxy.authorization else []
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and len(answer) < _MAX_ANSWER_BYTES:
        byte = sock.recv(1)  # Not one more: the next bytes are the server's.
        if not byte:
            break
        answer += byte
    status = found[1].decode() if (found := _STATUS.match(answer)) else "without a status"
    if status != "200":
        raise CallFailed(
            "UNAVAILABLE", f"the proxy at {proxy.host}:{proxy.port} answered HTTP status {status}", http_status=status
        )
