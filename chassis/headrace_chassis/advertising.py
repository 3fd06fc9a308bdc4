"""The address under which others reach a server."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress

from headrace_chassis.auth import is_loopback, is_unix, split_address
from headrace_chassis.errors import AddressInvalid

_FLAG = "--advertise"
# Reserved for examples, so that the way there is the default route. Nothing is sent.
_ELSEWHERE = "192.0.2.1:9"
_LOOPBACK = "clients on other machines can't reach %s; give --listen or %s"

logger = logging.getLogger(__name__)


def advertised(listening: str, *, given: str, towards: Sequence[str]) -> str:
    """Returns `given`, or the address `listening`; in place of every interface, the one that leads `towards` a server.

    Loopback stands for every interface only on a machine without a way to anywhere else. Raises AddressInvalid where
    others can't use that address.
    """
    if given:
        if not is_unix(given):
            host, port = split_address(given, flag=_FLAG)
            if not host or not port or _is_every_interface(host):
                raise AddressInvalid(f"Nobody can connect to {given}; {_FLAG} takes the HOST:PORT that clients reach.")
        return given
    if is_unix(listening):
        return listening
    host, port = split_address(listening)
    if host and not _is_every_interface(host):
        if is_loopback(listening) and not all(map(is_loopback, towards)):
            logger.warning(_LOOPBACK, listening, _FLAG)
        return listening
    family = socket.AF_INET if host == "0.0.0.0" else socket.AF_UNSPEC  # noqa: S104 - compared, not bound.
    hosts = [_own_address(address, family) for address in (*towards, _ELSEWHERE) if not is_unix(address)]
    found = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts if host is not None]
    # A registry on loopback serves clients on other machines too; its way there is nobody else's.
    for address in found:
        if not is_loopback(address):
            return address
    if found:
        logger.warning(_LOOPBACK, found[0], _FLAG)
        return found[0]
    raise AddressInvalid(
        f"The server listens on every interface ({listening}), and the address that clients reach can't be told from "
        f"the network; give it with {_FLAG} HOST:PORT."
    )


def _is_every_interface(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def _own_address(towards: str, family: socket.AddressFamily) -> str | None:
    """Returns this machine's address on the way to another; None if there is no way."""
    host, port = split_address(towards)
    with suppress(OSError):
        for kind, _, _, _, target in socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(kind, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # Sends nothing: the system only looks for the route.
                own = str(probe.getsockname()[0])
                if not ipaddress.ip_address(own.partition("%")[0]).is_link_local:
                    return own
    return None
