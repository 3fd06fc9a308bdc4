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
    max_concurrent_rpcs: int = 1000
    max_streams: int = 256  # Of `max_concurrent_rpcs`; health watches are not counted.
    max_receive_bytes: int = 4 * MIB
    max_send_bytes: int = 17 * MIB  # A chunk of 16 MiB and its header.
    keepalive_s: float = 30.0  # Interval of pings to a silent client, which has a third of it to answer.

    def __post_init__(self) -> None:
        """Raises ValueError for limits and times that are not positive."""
        limits = (self.max_concurrent_rpcs, self.max_streams, self.max_receive_bytes, self.max_send_bytes)
        if min(limits) < 1 or self.grace_s <= 0 or self.keepalive_s <= 0:
            raise ValueError("limits and times of a server must be positive")

    @property
    def protected(self) -> bool:
        """True when clients must send a token over an encrypted connection."""
        return self.token is not None and self.tls is not None
