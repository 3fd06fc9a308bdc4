"""How a server is configured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from headrace_chassis.auth import Tls

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How and where to serve; only `listen` is required."""

    listen: str  # `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`; with port 0 the system chooses.
    grace_s: float = 10.0  # From the signal to the end of the process.
    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    insecure: bool = False
    metrics_listen: str | None = None
    ready_file: Path | None = None
    max_concurrent_rpcs: int = 1000  # Health calls are not counted.
    max_streams: int = 256  # Of `max_concurrent_rpcs`.
    max_connections: int = 2000  # Fewer where the limit of open files is low.
    silence_s: float = 5.0  # A connection without a call for so long may be closed to make room for others.
    max_receive_bytes: int = 4 * MIB
    max_send_bytes: int = 17 * MIB  # A chunk of 16 MiB and its header.
    keepalive_s: float = 30.0  # Interval of pings to a silent client, which has a third of it to answer.

    def __post_init__(self) -> None:
        """Raises ValueError for limits and times that are not positive."""
        limits = (self.max_concurrent_rpcs, self.max_streams, self.max_receive_bytes, self.max_send_bytes)
        times = (self.grace_s, self.keepalive_s, self.silence_s)
        if min(*limits, self.max_connections) < 1 or min(times) <= 0:
            raise ValueError("limits and times of a server must be positive")

    @property
    def protected(self) -> bool:
        """True when clients must send a token over an encrypted connection."""
        return self.token is not None and self.tls is not None
