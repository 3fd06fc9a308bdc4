"""Proofs of identity: certificates for servers, a bearer token for the client, and when TLS is used."""

from __future__ import annotations

import pkgutil
import re
import ssl
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Self

from headrace_client.errors import InvalidArgument
from headrace_client.rpc.addresses import is_local

SYSTEM = "system"  # Stands for a file with the root certificates of this machine.
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
# Debian, Red Hat, SUSE, and Alpine or macOS.
_SYSTEM_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Root certificates (PEM) for the server, a bearer token for the client.

    TLS is used with root certificates, and with a token beyond this machine, then with the system's roots: a token
    never goes out in clear.
    """

    token: str | None = field(default=None, repr=False)
    ca_pem: bytes | None = None

    @classmethod
    def load(cls, token: str | None, ca_file: str | Path | None) -> Self:
        """Reads the root certificates; `system` stands for those of this machine. Raises InvalidArgument."""
        if not ca_file:
            return cls(token=token)
        try:
            pem = system_roots() if str(ca_file) == SYSTEM else Path(ca_file).read_bytes()
        except OSError as exc:
            raise InvalidArgument(f"the root certificate can't be read: {exc}") from exc
        if not _CERTIFICATE.search(pem):
            raise InvalidArgument(f"{ca_file} holds no certificate in PEM form")
        return cls(token=token, ca_pem=pem)

    def roots(self, address: str) -> bytes | None:
        """Returns the root certificates for TLS with the server at an address; None: without TLS."""
        if self.ca_pem is None and self.token and not is_local(address):
            return system_roots()
        return self.ca_pem


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
