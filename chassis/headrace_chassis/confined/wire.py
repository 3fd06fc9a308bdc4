"""Messages between a server and a child: a byte for the kind, the size as a uint32, the content.

The server sends a JOB, then a REPLY to each ITEM. The child sends ITEMs, and at last its ANSWER, an ERROR (one of the
server's errors, by the name of its class) or a FAULT (any other exception).
"""

from __future__ import annotations

import socket
import struct

JOB, REPLY, ITEM, ANSWER, ERROR, FAULT = b"J", b"R", b"I", b"A", b"E", b"F"

# What the zygote tells of a child that has ended: its status as `wait` gives it.
STATUS = struct.Struct("<i")
NOT_STARTED = -1  # Instead of a status: the system gave no process.
# Exit statuses of a child, apart from those that Python uses.
OVER_MEMORY, OVER_OUTPUT = 97, 98
# Files that a job may carry, apart from its two sockets.
MAX_FILES = 8

_HEAD = struct.Struct("<cI")


def send(channel: socket.socket, kind: bytes, content: bytes) -> None:
    """Sends a message; OSError if the other side is gone."""
    channel.sendall(_HEAD.pack(kind, len(content)))
    channel.sendall(content)


def receive(channel: socket.socket, *, max_bytes: int) -> tuple[bytes, bytes]:
    """Returns kind and content of the next message; EOFError at the end of input, ValueError beyond `max_bytes`."""
    kind, size = _HEAD.unpack(_exactly(channel, _HEAD.size))
    if size > max_bytes:
        raise ValueError(size)
    return kind, bytes(_exactly(channel, size))


def _exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        n_bytes = channel.recv_into(rest)
        if not n_bytes:
            raise EOFError
        rest = rest[n_bytes:]
    return data
