"""The connections of clients: a bound, and room for callers when others hold connections that say nothing.

gRPC accepts no more than the bound, ends a connection that sends no HTTP/2 within seconds, and one without calls after
minutes. A peer that keeps connections open for nothing could still take them all within that time, so that the ones
that never made a call with the token are closed earlier, the oldest first, while more than half of the bound is taken.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")
_LOOK_S = 1.0

logger = logging.getLogger(__name__)


class Connections:
    """Closes silent connections to the port `port` of this process while more than half of `most` are open.

    `busy_peers` returns the peers with a call in progress, spelled as gRPC does, such as `ipv4:10.0.0.7:5000`.
    """

    def __init__(
        self,
        *,
        port: int,
        most: int,
        silence_s: float,
        busy_peers: Callable[[], set[str]],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port = port
        self._most = most
        self._silence_s = silence_s
        self._busy_peers = busy_peers
        self._clock_s = clock_s
        self._since: dict[str, float] = {}
        self._heard: set[str] = set()

    def heard(self, peer: str) -> None:
        """Notes that a connection has made a call that it may make: it is not closed."""
        self._heard.add(_spelled(peer))

    async def run(self) -> None:
        """Looks every second, until it is cancelled."""
        while await asyncio.to_thread(_DESCRIPTORS.is_dir):  # Only Linux has it; elsewhere gRPC's limits have to do.
            await asyncio.sleep(_LOOK_S)
            try:
                # In a thread: thousands of descriptors take milliseconds to look through.
                await asyncio.to_thread(self.look, self._busy_peers())
            except OSError as exc:
                logger.warning("can't look through the open connections: %s", exc)

    def look(self, busy_peers: set[str]) -> int:
        """Closes the silent connections that are too many, but those of `busy_peers`; returns their number."""
        now, room = self._clock_s(), self._most // 2
        few = len(os.listdir(_DESCRIPTORS)) <= room  # noqa: PTH208 - names are enough.
        if few and len(self._heard) <= self._most:  # Beyond it, peers are forgotten that have gone.
            self._since.clear()
            return 0
        heard = set(self._heard)
        open_now = dict(self._incoming())
        self._heard -= heard - open_now.keys()
        self._since = {peer: self._since.get(peer, now) for peer in open_now}
        busy = self._heard | {_spelled(peer) for peer in busy_peers}
        silent = [peer for peer, since in self._since.items() if peer not in busy and now - since >= self._silence_s]
        silent = sorted(silent, key=self._since.__getitem__)[: max(0, len(open_now) - room)]
        for peer in silent:
            with _connection(open_now[peer]) as one:
                if one is not None and _peer_of(one) == peer:  # Else the descriptor is another's by now.
                    one.shutdown(socket.SHUT_RDWR)
        if silent:
            logger.warning("closed %d silent connections: %d of at most %d", len(silent), len(open_now), self._most)
        return len(silent)

    def _incoming(self) -> Iterator[tuple[str, int]]:
        """Yields peer and descriptor of each connection to the port."""
        for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208
            with _connection(int(name)) as one:
                if one is not None and one.getsockname()[1] == self._port:
                    yield _peer_of(one), int(name)


@contextmanager
def _connection(descriptor: int) -> Iterator[socket.socket | None]:
    """Shares a descriptor for the time of a block, one at a time since they are scarce; None if it is no connection."""
    one = None
    with suppress(OSError):  # Closed meanwhile; a socket that listens.
        if str((_DESCRIPTORS / str(descriptor)).readlink()).startswith("socket:"):
            one = socket.socket(fileno=os.dup(descriptor))
    try:
        internet = one is not None and one.family in (socket.AF_INET, socket.AF_INET6)
        yield one if internet and one is not None and _peer_of(one) else None
    except OSError as exc:  # The client was faster.
        logger.debug("a connection has gone: %s", exc)
    finally:
        if one is not None:
            one.close()


def _peer_of(one: socket.socket) -> str:
    try:
        host, port = one.getpeername()[:2]
    except OSError:  # The listening socket.
        return ""
    return f"{host.removeprefix('::ffff:')}:{port}"


def _spelled(peer: str) -> str:
    """Returns `host:port` of gRPC's `ipv4:host:port` or `ipv6:[host]:port`."""
    host, _, port = peer.partition(":")[2].rpartition(":")
    return f"{host.strip('[]').removeprefix('::ffff:')}:{port}"
