"""How a stream fetches its rows: sizes, waits and transport. None of it changes a row or the order of rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum

from headrace_client.values.common import choice

SILENCE_S = 45.0  # Three heartbeats of the servers.


class Transport(StrEnum):
    """How rows travel: INLINE in messages, MAPPED from the set's files, AUTO from files where the client sees them."""

    AUTO = "auto"
    INLINE = "inline"
    MAPPED = "mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts: doubling from `first_s` to `most_s`, each shortened by up to half at random."""

    first_s: float = 0.1
    most_s: float = 5.0

    def wait_s(self, attempt: int) -> float:
        """The wait after the `attempt`-th failure in a row, counted from 0."""
        full = min(self.most_s, self.first_s * 2.0 ** min(attempt, 16))
        return full * (0.5 + random.random() / 2)  # noqa: S311 - jitter, not a secret.


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTuning:
    """Sizes, limits and transport of a stream.

    `chunk_bytes` bounds a message; 0 leaves its size to the server. `queue_bytes` bounds the rows read ahead. A server
    that sends nothing for `silence_s` is given up and connected again; without a row for `reconnect_deadline_s` the
    stream raises StreamLost, and `backoff` spaces the attempts until then. `copy` false lets batches of tensors be
    views of a message where no conversion is needed; chunks themselves are always views.
    """

    chunk_bytes: int = 0
    queue_bytes: int = 64 * 1024 * 1024
    silence_s: float = SILENCE_S
    reconnect_deadline_s: float = 120.0
    backoff: Backoff = field(default_factory=Backoff)
    transport: Transport | str = Transport.AUTO
    copy: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "transport", choice(Transport, str(self.transport), "transport"))


DEFAULT_TUNING = StreamTuning()
