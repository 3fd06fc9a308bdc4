"""Connections from one server to another: which addresses, when TLS, no token in clear, no proxy on loopback.

The client follows the same rules (`headrace_client.rpc`), and imports nothing of a server.
"""

from __future__ import annotations

import pkgutil
import re
import socket
import ssl
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc

from headrace_chassis.auth import is_loopback, is_unix, split_address
from headrace_chassis.errors import AddressInvalid, TlsFileInvalid

SYSTEM = "system"  # Stands for a file with the root certificates of this machine.
_SCHEMES = ("dns:///", "ipv4:", "ipv6:")  # gRPC's own spellings, of which the address itself is all that matters here.
_MAX_ADDRESSES = 16
_PROBE_S = 2.0
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
# Debian, Red Hat, SUSE, and Alpine or macOS.
_SYSTEM_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A bearer token for another server, and root certificates (PEM) for its own; the flag that gives them."""

    token: str = field(default="", repr=False)
    root_certificates: bytes | None = None
    ca_flag: str = "--ca-file"

    def roots(self, address: str) -> bytes | None:
        """Returns the root certificates for TLS with an address; None: without. A token never goes out in clear."""
        if self.root_certificates is None and self.token and not is_loopback(address):
            return system_roots()
        return self.root_certificates


def addresses_of(text: str, *, flag: str) -> tuple[str, ...]:
    """Splits the addresses of replicas, `HOST:PORT,HOST:PORT` or `unix:PATH`. Raises AddressInvalid."""
    scheme = next((each for each in _SCHEMES if text.startswith(each)), "")
    found = tuple(part.strip() for part in text.removeprefix(scheme).split(","))
    for address in found:
        if not is_unix(address) and not split_address(address, flag=flag)[0]:
            raise AddressInvalid(f"{address!r} names no host; {flag} takes HOST:PORT, [IPV6]:PORT or unix:PATH.")
    if len(found) > _MAX_ADDRESSES:
        raise AddressInvalid(f"{flag} takes up to {_MAX_ADDRESSES} addresses.")
    return tuple(dict.fromkeys(found))


def read_roots(file: Path, *, flag: str) -> bytes:
    """Reads root certificates; `system` stands for those of this machine. Raises TlsFileInvalid."""
    try:
        pem = system_roots() if str(file) == SYSTEM else file.read_bytes()
    except OSError as exc:
        raise TlsFileInvalid(f"Can't read {file} ({exc}); {flag} takes root certificates in PEM form.") from exc
    if not _CERTIFICATE.search(pem):
        raise TlsFileInvalid(f"{file} holds no certificate; {flag} takes root certificates in PEM form.")
    return pem


@cache
def system_roots() -> bytes:
    """Returns the root certificates that this machine trusts; those that gRPC brings along where it names none."""
    named = ssl.get_default_verify_paths()
    for file in (named.cafile, named.openssl_cafile, *_SYSTEM_FILES):
        if file and Path(file).is_file():
            found = _CERTIFICATE.findall(Path(file).read_bytes())
            if found:
                return b"\n".join(found)
    return pkgutil.get_data("grpc._cython", "_credentials/roots.pem") or b""


def open_channel(address: str, credentials: Credentials) -> grpc.aio.Channel:
    """Opens a channel to another server."""
    options: list[tuple[str, Any]] = [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A server that comes back is found within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # So long an attempt to connect may take: 20 s without this line.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.use_local_subchannel_pool", 1),  # Not to wait out the backoff of a channel that was closed.
        # Loopback never leads through a proxy; for other addresses gRPC reads `http_proxy` and `no_proxy`.
        ("grpc.enable_http_proxy", 0 if is_loopback(address) else 1),
    ]
    roots = credentials.roots(address)
    if roots is None:
        return grpc.aio.insecure_channel(address, options=options)
    if is_unix(address):
        options.append(("grpc.default_authority", "localhost"))
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)


def tls_hint(address: str, credentials: Credentials, text: str) -> str:
    """Returns a remedy where the failure `text` comes from TLS on one side only, or from its certificate; else "".

    Blocks for seconds at most: it may look at the first bytes that the server sends.
    """
    roots = credentials.roots(address)
    if roots is None:
        broken = any(word in text for word in ("closed", "reset", "EOF", "GOAWAY", "settings frame", "HTTP/2"))
        if broken and _speaks_tls(address):
            return f"It speaks TLS: give its root certificate with {credentials.ca_flag}."
        return ""
    fault = _fault_of_tls(address, roots)
    if fault == "clear" and credentials.root_certificates is None:
        return "It speaks no TLS, and a token is not sent in clear: start it with --tls-cert and --tls-key."
    if fault == "clear":
        return f"It speaks no TLS: leave {credentials.ca_flag} out, or start it with --tls-cert and --tls-key."
    if fault == "certificate":
        return f"Its certificate is not trusted: give its root certificate with {credentials.ca_flag}."
    return ""


def _speaks_tls(address: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # Nothing is sent.
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(address) as sock, context.wrap_socket(sock):
            return True
    except ssl.SSLError as exc:  # An alert is an answer in TLS too.
        return "ALERT" in str(exc).upper()
    except (OSError, ValueError):
        return False


def _fault_of_tls(address: str, roots: bytes) -> str:
    """Tries a TLS handshake: `clear` if the server speaks no TLS, `certificate` if it is not trusted, else empty."""
    try:
        context = ssl.create_default_context(cadata=roots.decode("ascii", "ignore"))
        context.set_alpn_protocols(["h2"])
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        with _connected(address) as sock, context.wrap_socket(sock, server_hostname=split_address(address)[0]):
            return ""
    except ssl.SSLCertVerificationError:
        return "certificate"
    except ssl.SSLError as exc:
        return "clear" if "WRONG_VERSION_NUMBER" in str(exc) else ""
    except (OSError, ValueError):
        return ""


def _connected(address: str) -> socket.socket:
    if is_unix(address):
        raise ValueError(address)
    sock = socket.create_connection(split_address(address), _PROBE_S)
    sock.settimeout(_PROBE_S)
    return sock
