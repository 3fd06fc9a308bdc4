"""The places that calls take while they are in progress: of all calls, of streams, of health watches.

A service may give some of its methods places of their own, so that its callers of one kind never take those of another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from headrace_chassis.errors import Overloaded, TooManyStreams

# Health watches need no token and never end. A machine with a few probes and load balancers has a handful.
MAX_HEALTH_WATCHES = 64
MAX_HEALTH_WATCHES_OF_A_HOST = 16
# Checks need no token either. They end at once, but for those whose message does not come, or comes with megabytes.
MAX_HEALTH_CHECKS = 1024
MAX_HEALTH_CHECKS_OF_A_HOST = 64


# One connection has no more than this share of the streams, so that no client alone takes all.
_SHARE_OF_A_CONNECTION = 2


class Call(Protocol):
    """The facts of a call that decide which place it takes."""

    @property
    def method(self) -> str:
        """Its full name, `/package.Service/Method`."""

    @property
    def streaming(self) -> bool:
        """True for a call in which either side sends a stream."""

    @property
    def is_health(self) -> bool:
        """True for a call of the standard health service."""

    @property
    def peer(self) -> str:
        """The caller's address, as gRPC spells it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many calls may be in progress at once, and how many of them may be streams."""

    max_rpcs: int
    max_streams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPlaces:
    """Methods whose calls have places of their own: a service `/package.Service/`, or a method of it."""

    prefix: str
    limits: Limits


class Places:
    """Counts the calls in progress. Health calls, which anybody may make, never take the place of another call."""

    def __init__(self, limits: Limits, own: Sequence[OwnPlaces] = ()) -> None:
        self._common = _Group(limits)
        self._own = tuple((each.prefix, _Group(each.limits)) for each in own)
        self._health_watches: Counter[str] = Counter()  # By host, as the checks.
        self._health_checks: Counter[str] = Counter()

    @contextmanager
    def taken(self, call: Call) -> Iterator[None]:
        """Holds a place while the block runs. Raises Overloaded or TooManyStreams if there is none."""
        if call.is_health:
            with self._health_place(call):
                yield
            return
        group = next((group for prefix, group in self._own if call.method.startswith(prefix)), self._common)
        with group.taken(call):
            yield

    @contextmanager
    def _health_place(self, call: Call) -> Iterator[None]:
        host = call.peer.rpartition(":")[0]
        held, of_a_host, most, of = self._health_checks, MAX_HEALTH_CHECKS_OF_A_HOST, MAX_HEALTH_CHECKS, "checks"
        if call.streaming:
            held, of = self._health_watches, "watches"
            of_a_host, most = MAX_HEALTH_WATCHES_OF_A_HOST, MAX_HEALTH_WATCHES
        if held[host] >= of_a_host:
            raise TooManyStreams(of_a_host, of=f"health {of} of your host")
        if held.total() >= most:
            raise TooManyStreams(most, of=f"health {of} of this server")
        held[host] += 1
        try:
            yield
        finally:
            held[host] -= 1
            if not held[host]:
                del held[host]


class _Group:
    """The places of some methods."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._n_calls = 0
        self._streams: Counter[str] = Counter()  # By peer, which is one connection.

    @contextmanager
    def taken(self, call: Call) -> Iterator[None]:
        if self._n_calls >= self._limits.max_rpcs:
            raise Overloaded(self._limits.max_rpcs)
        if call.streaming:
            self._check_streams(call.peer)
        self._n_calls += 1
        self._streams[call.peer] += call.streaming
        try:
            yield
        finally:
            self._n_calls -= 1
            self._streams[call.peer] -= call.streaming
            if not self._streams[call.peer]:
                del self._streams[call.peer]

    def _check_streams(self, peer: str) -> None:
        most = self._limits.max_streams
        if self._streams.total() >= most:
            raise TooManyStreams(most)
        share = max(1, most // _SHARE_OF_A_CONNECTION)
        # All connections over a Unix socket look like one peer.
        if self._streams[peer] >= share and not peer.startswith("unix"):
            raise TooManyStreams(share, of="streams of your connection")
