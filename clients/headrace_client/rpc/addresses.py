"""Addresses of servers: how they are written, which of them are on this machine, and which proxies lead to the others.

`HOST:PORT`, `[IPV6]:PORT`, `unix:PATH`; several with commas between stand for replicas, one of which is asked.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote, urlsplit

from headrace_client.errors import InvalidArgument

# gRPC's own spellings, of which the address itself is all that matters here.
_SCHEMES = ("dns:///", "ipv4:", "ipv6:")
_MAX_ADDRESSES = 16


def addresses_of(text: str, *, name: str) -> tuple[str, ...]:
    """Splits `HOST:PORT,HOST:PORT`. Raises InvalidArgument, which calls the field `name`, for anything else."""
    scheme = next((each for each in _SCHEMES if text.startswith(each)), "")
    found = tuple(part.strip() for part in text.removeprefix(scheme).split(",")) if text else ()
    if not found or len(found) > _MAX_ADDRESSES or not all(map(is_address, found)):
        raise InvalidArgument(
            f"{name} is HOST:PORT, [IPV6]:PORT or unix:PATH, up to {_MAX_ADDRESSES} with commas between, not {text!r}",
            fields={name: text},
        )
    return tuple(dict.fromkeys(found))


def is_address(address: str) -> bool:
    """True for `HOST:PORT`, `[IPV6]:PORT` and `unix:PATH`."""
    if is_unix(address):
        return not address.endswith(":")
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65535 and (":" not in host or bracketed)


def is_unix(address: str) -> bool:
    """True for the address of a Unix socket."""
    return address.startswith(("unix:", "unix-abstract:"))


def split(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT` or `[IPV6]:PORT`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_local(address: str) -> bool:
    """True for Unix sockets, `localhost` and loopback addresses: no other machine is on the way there."""
    if is_unix(address):
        return True
    host, _ = split(address)
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy, and the words by which it knows the caller."""

    host: str
    port: int
    authorization: str = ""

    @classmethod
    def of(cls, address: str, environment: Mapping[str, str]) -> Self | None:
        """Returns the proxy on the way to an address; None if there is none, and for addresses of this machine.

        By gRPC's own rules, so that rows take the way of all other calls: the first of `grpc_proxy`, `https_proxy` and
        `http_proxy`, unless the host ends with an entry of `no_grpc_proxy` or `no_proxy`, or lies in one's network.
        Raises InvalidArgument.
        """
        name = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(name)), "")
        if not name or is_local(address):
            return None
        host, _ = split(address)
        spared = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
        if any(_spares(entry.strip(), host) for entry in spared.split(",") if entry.strip()):
            return None
        url = environment[name]
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or 80
        except ValueError:  # Not with the text: a part of it may be the password.
            raise InvalidArgument(f"{name} is not of the form http://[USER:PASSWORD@]HOST:PORT") from None
        if parts.scheme != "http" or not parts.hostname:
            return None  # gRPC knows no other kind, and ignores it too.
        user = unquote(f"{parts.username}:{parts.password or ''}") if parts.username else ""
        authorization = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        return cls(host=parts.hostname, port=port, authorization=authorization)


def _spares(entry: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.lower())
