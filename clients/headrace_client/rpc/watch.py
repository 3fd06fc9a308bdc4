"""Watches that reconnect: a sequence of events that outlives connections and servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from headrace_client.errors import DeadlineExceeded, HeadraceError, Unavailable
from headrace_client.rpc.server_stream import ServerStream
from headrace_client.values import Backoff


class Event(Protocol):
    """An item of a watch."""

    @property
    def seq(self) -> int:
        """Grows with each event."""


_Ev = TypeVar("_Ev", bound=Event)


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

    `connect(after_seq, life_s)` opens a connection. A lost connection is opened again behind the last event seen; its
    snapshot is yielded too, since it may be the only trace of missed events. Raises DeadlineExceeded after
    `deadline_s`, and the last error once no message came for `reconnect_deadline_s`.
    """
    pauses = backoff or Backoff()
    ends_at = None if deadline_s is None else time.monotonic() + deadline_s
    heard_at, attempt, seq = time.monotonic(), 0, after_seq
    while True:
        try:
            with connect(seq, _left_s(ends_at)) as stream:
                for message in stream:
                    heard_at, attempt = time.monotonic(), 0
                    event = read(message)
                    if event is not None:
                        seq = event.seq
                        yield event
            return  # noqa: TRY300 - the server ended it, and there is nothing left to watch.
        except HeadraceError as exc:
            # Without a deadline of the watch, it is the call's own long life that ended, and another call goes on.
            long_call_ended = isinstance(exc, DeadlineExceeded) and exc.reason == DeadlineExceeded.REASON
            call_ended = ends_at is None and long_call_ended
            may_pass = isinstance(exc, Unavailable) or call_ended
            if not may_pass or time.monotonic() - heard_at > reconnect_deadline_s:
                raise
            wait_s, left_s = pauses.wait_s(attempt), _left_s(ends_at)
            time.sleep(wait_s if left_s is None else min(wait_s, left_s))
            attempt += 1


def _left_s(ends_at: float | None) -> float | None:
    if ends_at is None:
        return None
    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded("the watch reached its deadline before what it waited for happened")
    return left_s
