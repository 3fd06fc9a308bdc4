"""Which callers a server answers, and on which addresses it may listen."""

from __future__ import annotations

import hmac
import ipaddress
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from headrace_chassis.errors import AddressInvalid, ListenRefused, TlsFileInvalid, TokenFileInvalid, TokenInvalid

MIN_TOKEN_CHARACTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """A certificate chain and its private key, both PEM."""

    cert: bytes
    key: bytes = field(repr=False)


class TokenGate:
    """Admits RPCs that carry the token; without a token, admits every RPC."""

    def __init__(self, token: str | None) -> None:
        self._expected = token.encode() if token is not None else None

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Raises TokenInvalid unless the metadata holds `authorization: Bearer TOKEN`."""
        if self._expected is None:
            return
        given = next((value for key, value in metadata if key == "authorization"), b"")
        scheme, _, token = (given.encode() if isinstance(given, str) else given).partition(b" ")
        matches = hmac.compare_digest(token.strip(), self._expected)  # Its duration tells nothing about the token.
        if not matches or scheme.lower() != b"bearer":
            raise TokenInvalid


def read_token(path: Path, *, flag: str = "--token-file") -> str:
    """Reads a token: the file's content without surrounding white space, printable ASCII."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise TokenFileInvalid(f"Can't read a token from {path} ({exc}); point {flag} at a text file.") from exc
    if len(token) < MIN_TOKEN_CHARACTERS or not all("!" <= character <= "~" for character in token):
        raise TokenFileInvalid(
            f"{path} holds no usable token: it takes {MIN_TOKEN_CHARACTERS} or more printable characters without "
            f"spaces; make one with `openssl rand -hex 32 > {path}`."
        )
    return token


def read_tls(cert_path: Path, key_path: Path) -> Tls:
    """Reads certificate chain and key, and checks that they belong together."""

    def refuse_to_ask() -> NoReturn:  # Without it OpenSSL asks for the password on the terminal.
        raise ValueError("the key is encrypted")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_path, key_path, password=refuse_to_ask)
        return Tls(cert=cert_path.read_bytes(), key=key_path.read_bytes())
    except (OSError, ValueError) as exc:  # SSLError is an OSError.
        raise TlsFileInvalid(
            f"Can't use certificate {cert_path} with key {key_path} ({exc}); --tls-cert takes a PEM chain, "
            "--tls-key its unencrypted PEM key."
        ) from exc


def require_safe(listen: str, *, protected: bool, insecure: bool, flag: str = "--listen") -> None:
    """Raises ListenRefused for an address beyond loopback, unless the server is protected or told to be insecure."""
    if protected or insecure or is_loopback(listen):
        return
    raise ListenRefused(
        f"Refuses to listen on {listen}, which other machines can reach, without protection: give --token-file, "
        f"--tls-cert and --tls-key, or keep to loopback with {flag} 127.0.0.1:PORT, or accept the risk with --insecure."
    )


def is_loopback(listen: str) -> bool:
    """True for Unix sockets, `localhost`, 127.0.0.0/8 and ::1. Other host names count as remote; none is looked up."""
    if is_unix(listen):
        return True
    host, _ = split_address(listen)
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_unix(listen: str) -> bool:
    """True for the address of a Unix socket."""
    return listen.startswith(("unix:", "unix-abstract:"))


def split_address(address: str, *, flag: str = "--listen") -> tuple[str, int]:
    """Splits `HOST:PORT` or `[IPV6]:PORT`; an empty host means every interface."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    digits = port.isascii() and port.isdigit()
    if not colon or not digits or int(port) > 65535 or (":" in host and not bracketed):
        raise AddressInvalid(f"{address!r} is no address; {flag} takes HOST:PORT, [IPV6]:PORT or, for gRPC, unix:PATH.")
    return (host[1:-1] if bracketed else host), int(port)
