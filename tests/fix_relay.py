"""A TCP relay that cuts connections: stands for the network between a client and a server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable

_RESET = struct.pack("ii", 1, 0)  # Closing then sends RST at once, and bytes in flight are lost.
_AT_ONCE = 16 * 1024


class Relay:
    """Passes bytes between its clients and `upstream`, HOST:PORT.

    `cuts` are numbers of bytes. The first connection that has carried so many bytes from the server is reset; then the
    next number holds, counted from the beginning of each connection.
    """

    def __init__(self, upstream: str, cuts: Iterable[int] = ()) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._cuts = deque(cuts)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self.n_cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._closed = True
        # close() alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            left = list(self._sockets)
        for each in left:
            _reset(each)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._upstream, timeout=5.0)
            except OSError:  # The server is down: the relay behaves as the server would.
                _reset(near)
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for source, target, counted in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pass_on, args=(source, target, counted), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        n_bytes = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_AT_ONCE):
                n_bytes += len(data)
                if counted and self._cut_at(n_bytes):
                    break
                target.sendall(data)
        for each in (source, target):
            _reset(each)
            with self._lock:
                self._sockets.discard(each)

    def _cut_at(self, n_bytes: int) -> bool:
        with self._lock:
            if not self._cuts or n_bytes < self._cuts[0]:
                return False
            self._cuts.popleft()
            self.n_cut += 1
            return True


def _reset(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        each.shutdown(socket.SHUT_RDWR)
    each.close()
