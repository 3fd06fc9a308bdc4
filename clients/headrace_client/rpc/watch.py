"""Watches that reconnect: a sequence of events that outlives connections and servers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from headrace_client.errors import DeadlineExceeded, HeadraceError, Unavailable
from headrace_client.rpc.server_stream import ServerStream


class Event(Protocol):
    """What a watch yields."""

    @property
    def seq(self) -> int:
        """Grows with each event."""


_Ev = TypeVar("_Ev", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts: doubling from `first_s` to `most_s`, each with up to half of jitter off."""

    first_s: float = 0.1
    most_s: float = 5.0

    def wait_s(self, attempt: int) -> float:
        """The wait after the `attempt`-th failure in a row, counted from 0."""
        full = min(self.most_s, self.first_s * 2.0 ** min(attempt, 16))
        return full * (0.5 + random.random() / 2)  # noqa: S311 - jitter, not a secret.


def watch(
    connect: Callable[[int, float | None], ServerStream],
    read: Callable[[Any], _Ev | None],
    *,
    after_seq: int = 0,
    deadline_s: float | None = None,
    reconnect_deadline_s: float = 120.0,
    backoff: Backoff | None = None,
) -> Iterator[_Ev]:
    """Yields events until the server ends the watch.

    `connect(after_seq, life_s)` opens a connection. A lost one is opened again behind the last event seen; the
    snapshot that comes first then is yielded too, since it may be all that is left of what was missed. Raises
    DeadlineExceeded after `deadline_s`, and the last error once nothing came for `reconnect_deadline_s`.
    """
    pauses = backoff or Backoff()
    ends_at = None if deadline_s is None else time.monotonic() + deadline_s
    heard_at, attempt, seq = time.monotonic(), 0, after_seq
    while True:
        try:
            with connect(seq, _left(ends_at)) as stream:
                for message in stream:
                    heard_at, attempt = time.monotonic(), 0
                    event = read(message)
                    if event is not None:
                        seq = event.seq
                        yield event
            return  # noqa: TRY300 - the server ended it, and there is nothing left to watch.
        except HeadraceError as exc:
            if not _passing(exc, ends_at) or time.monotonic() - heard_at > reconnect_deadline_s:
                raise
            _pause(pauses.wait_s(attempt), ends_at)
            attempt += 1


def _left(ends_at: float | None) -> float | None:
    if ends_at is None:
        return None
    left = ends_at - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the watch reached its deadline before what it waited for happened")
    return left


def _passing(exc: HeadraceError, ends_at: float | None) -> bool:
    """True when a new connection may help."""
    if isinstance(exc, DeadlineExceeded):
        return ends_at is None and exc.reason == DeadlineExceeded.REASON  # Only the call's own long life ended.
    return isinstance(exc, Unavailable)


def _pause(wait_s: float, ends_at: float | None) -> None:
    left = _left(ends_at)
    time.sleep(wait_s if left is None else min(wait_s, left))
