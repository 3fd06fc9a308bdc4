"""Channels to replicas of one server: one is asked, and the next one once it does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from headrace_client import errors
from headrace_client.rpc.addresses import is_local, is_unix
from headrace_client.rpc.methods import service_config
from headrace_client.rpc.security import Security

MAX_RECEIVE_BYTES = 17 * 1024 * 1024  # A chunk of 16 MiB and its frame.
# Replicas that are all away are asked again over some seconds, as long as gRPC repeats a call to one server.
_ROUNDS, _PAUSE_S = 6, 0.5
# Servers wait for up to 20 s within a call: for memory to come back, for a turn at the hub.
_ANSWER_S = 25.0
_T = TypeVar("_T")


class Replicas:
    """Channels, opened when they are used. Threads may share it."""

    def __init__(self, addresses: Sequence[str], security: Security) -> None:
        self._addresses = tuple(addresses)
        self.n_addresses = len(self._addresses)
        self._security = security
        self._at = 0
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """The address that is asked at present."""
        return self._addresses[self._at]

    def channel(self) -> grpc.Channel:
        """The channel to that address. Raises ValueError once closed, as gRPC does."""
        address = self.address
        with self._lock:
            if self._closed:
                raise ValueError("closed")
            if address not in self._channels:
                self._channels[address] = open_channel(address, self._security, repeat=len(self._addresses) == 1)
            return self._channels[address]

    def move_on(self, address: str) -> None:
        """Asks the next address from now on, if it is still `address` that is asked."""
        with self._lock:
            if address == self.address:
                self._at = (self._at + 1) % len(self._addresses)

    def first_answer(
        self,
        call: Callable[[grpc.Channel, float], _T],
        *,
        deadline_s: float,
        failed: Callable[[Any, str], errors.HeadraceError],
    ) -> _T:
        """Returns the answer to `call(channel, timeout_s)` of the first replica that gives one.

        A server that hangs must not use up the time of the others: it gets its share of the deadline, and no less than
        the longest wait of a server if the deadline is longer. One that comes back is asked again.
        `failed(error, address)` turns gRPC's error into ours. Raises the last one if no replica answers.
        """
        ends_at = time.monotonic() + deadline_s
        alone = len(self._addresses) == 1  # gRPC then repeats the call by itself.
        share_s = max(deadline_s / len(self._addresses), _ANSWER_S if deadline_s > _ANSWER_S else 0.0)
        n_tries = 1 if alone else _ROUNDS * len(self._addresses)
        for attempt in range(n_tries):
            address, channel, left_s = self.address, self.channel(), ends_at - time.monotonic()
            try:
                return call(channel, left_s if alone else min(left_s, share_s))
            except grpc.RpcError as exc:
                error, left_s = failed(exc, address), ends_at - time.monotonic()
                hangs = isinstance(error, errors.DeadlineExceeded) and error.reason == errors.DeadlineExceeded.REASON
                # These calls may be repeated: the contract's are idempotent.
                is_away = hangs or isinstance(error, errors.Unavailable)
                if not is_away or attempt == n_tries - 1 or left_s <= _PAUSE_S:
                    raise error from exc
                self.move_on(address)
            if (attempt + 1) % len(self._addresses) == 0:
                time.sleep(_PAUSE_S)
        raise AssertionError("there is an address")

    def close(self) -> None:
        """Closes the channels; calls in progress are cancelled."""
        with self._lock:
            self._closed = True
            channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            channel.close()


def open_channel(address: str, security: Security, *, repeat: bool) -> grpc.Channel:
    """Opens a channel, with TLS where `security` wants it. `repeat`: gRPC repeats unary calls on UNAVAILABLE."""
    options: list[tuple[str, Any]] = [
        # The servers permit a ping every 10 s, and close connections that ping more often.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),  # The server has a limit of its own.
        ("grpc.enable_retries", int(repeat)),
        ("grpc.service_config", service_config()),
        # gRPC's default of up to two minutes between attempts outlives most restarts.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # So long an attempt to connect may take: 20 s without this line.
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Loopback never leads through a proxy; for other addresses gRPC reads `http_proxy` and `no_proxy`.
        ("grpc.enable_http_proxy", 0 if is_local(address) else 1),
        # A channel of its own: a client must not wait out the backoff of another one that was closed.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    roots = security.roots(address)
    if roots is None:
        return grpc.insecure_channel(address, options)
    if is_unix(address):
        options.append(("grpc.default_authority", "localhost"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options)
