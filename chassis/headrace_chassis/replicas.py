"""Replicas of another server: one is asked, and the next one when it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
from grpc_status import rpc_status

from headrace_chassis.deadline import remaining_s
from headrace_chassis.dialing import Credentials, open_channel, tls_hint
from headrace_chassis.status import reason_of

# All replicas were asked: a server that restarts takes seconds, and asking it more often only costs.
_PAUSE_S = 0.2
# So much earlier than its own caller gives up, a call ends: the caller then gets an error that names the server.
_MARGIN_S = 0.5

T = TypeVar("T")


class Replicas:
    """Channels to the servers at `addresses`, opened when they are used. For one event loop."""

    def __init__(self, addresses: Sequence[str], credentials: Credentials) -> None:
        self._addresses = tuple(addresses)
        self._credentials = credentials
        self._at = 0
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.asked = self.address  # The last one, for messages.

    @property
    def address(self) -> str:
        """The address that is asked at present."""
        return self._addresses[self._at]

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel to that address."""
        if self.address not in self._channels:
            self._channels[self.address] = open_channel(self.address, self._credentials)
        return self._channels[self.address]

    def move_on(self, address: str) -> None:
        """Asks the next address from now on, if it is still `address` that is asked."""
        if address == self.address:
            self._at = (self._at + 1) % len(self._addresses)

    async def answer(self, call: Callable[[grpc.aio.Channel, float], Awaitable[T]], *, deadline_s: float) -> T:
        """Returns the answer to `call(channel, timeout_s)` of the first server that gives one.

        While none can be reached they are asked in turn, until the deadline, or until the caller of this server gives
        up. The call must be one that may be repeated. Raises the last AioRpcError.
        """
        now = asyncio.get_running_loop().time
        ends_at = now() + deadline_s
        if (given_s := remaining_s()) is not None:
            ends_at = min(ends_at, now() + max(given_s - _MARGIN_S, _PAUSE_S))
        n_asked = 0
        while True:
            self.asked = address = self.address
            left_s = ends_at - now()
            # A server that hangs must not use up the time of the others.
            timeout_s = left_s if len(self._addresses) == 1 else min(left_s, max(1.0, deadline_s / 4))
            try:
                return await call(self.channel, max(timeout_s, 0.001))
            except grpc.aio.AioRpcError as exc:
                if not is_away(exc):
                    raise
                self.move_on(address)
                hangs = exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if ends_at - now() <= _PAUSE_S or (hangs and len(self._addresses) == 1):
                    raise
            n_asked += 1
            if n_asked % len(self._addresses) == 0:
                await asyncio.sleep(_PAUSE_S)

    async def hint(self, exc: grpc.aio.AioRpcError, address: str) -> str:
        """Returns a remedy if a connection breaks because one side speaks TLS; else ""."""
        if exc.code() is not grpc.StatusCode.UNAVAILABLE or _reason(exc):
            return ""
        return await asyncio.to_thread(tls_hint, address, self._credentials, exc.details() or "")

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            await channel.close()


def is_away(exc: grpc.aio.AioRpcError) -> bool:
    """True if the server can't be reached, hangs or goes away: another replica, or the next one, may answer."""
    reason = _reason(exc)
    if exc.code() is grpc.StatusCode.UNAVAILABLE:
        return reason in ("", "SHUTTING_DOWN")
    return exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not reason


def _reason(exc: grpc.aio.AioRpcError) -> str:
    try:
        status = rpc_status.from_call(exc)
    except ValueError:
        return ""
    return reason_of(status) if status is not None else ""
