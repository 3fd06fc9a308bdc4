"""Why a connection breaks where one side speaks TLS and the other does not: gRPC says no more than "Socket closed"."""

from __future__ import annotations

import socket
import ssl

from headrace_client.rpc.addresses import is_unix, split
from headrace_client.rpc.security import Security

_PROBE_S = 2.0
_BROKEN = ("closed", "reset", "broken", "HTTP/2", "GOAWAY", "goes away", "EOF", "handshake", "settings frame")
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER", "record layer", "HTTP_REQUEST")


def tls_hint(address: str, security: Security, text: str) -> str:
    """Returns the remedy where the failure `text` comes from TLS on one side only, or from its certificate; else ""."""
    roots = security.roots(address)
    if roots is None:
        if any(word in text for word in _BROKEN) and _speaks_tls(address):
            return (
                f"{address} speaks TLS: give its root certificate with --ca-file, HEADRACE_CA_FILE or ca_file=; "
                "`system` stands for the certificates of this machine"
            )
        return ""
    fault = _fault_of_tls(address, roots)
    if fault == "clear" and security.ca_pem is None:
        return (
            f"{address} speaks no TLS, and a token is not sent in clear to another machine: start the server with "
            "--tls-cert and --tls-key, or reach it at 127.0.0.1 through an SSH tunnel"
        )
    if fault == "clear":
        return f"{address} speaks no TLS: leave the root certificate out, or start the server with --tls-cert"
    if fault == "certificate":
        return f"give the root certificate of {address} with --ca-file, HEADRACE_CA_FILE or ca_file=, and its own name"
    return ""


def _speaks_tls(address: str) -> bool:
    """True if a TLS handshake begins; the certificate does not matter, since nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
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
        with _connected(address) as sock, context.wrap_socket(sock, server_hostname=split(address)[0]):
            return ""
    except ssl.SSLCertVerificationError:
        return "certificate"
    except ssl.SSLError as exc:
        return "clear" if any(word in str(exc) for word in _NO_TLS) else ""
    except (OSError, ValueError):
        return ""


def _connected(address: str) -> socket.socket:
    if is_unix(address):
        raise ValueError(address)
    sock = socket.create_connection(split(address), _PROBE_S)
    sock.settimeout(_PROBE_S)
    return sock
