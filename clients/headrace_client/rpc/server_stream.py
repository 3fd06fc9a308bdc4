"""Server-streaming calls under a limit of silence: of gRPC, and over a socket of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from headrace_client import errors
from headrace_client.rpc.http2 import CallFailed, SocketCall


class ServerStream:
    """The messages of one server-streaming call. Raises StreamSilent when none comes for `silence_s`.

    The limit runs only while the reader waits for a message, so that a slow reader is not taken for a silent server.
    `failed` turns gRPC's error into the one to raise.
    """

    def __init__(
        self, call: Any, *, silence_s: float, address: str, failed: Callable[[Any], errors.HeadraceError]
    ) -> None:
        self._call = call
        self._failed = failed
        self._silence_s = silence_s
        self._address = address
        self._waiting_since: float | None = None
        self._silent = False
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="headrace-watchdog", daemon=True)
        self._watchdog.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self._waiting_since = time.monotonic()
        try:
            return next(self._call)
        except StopIteration:
            self.close()
            raise
        except (grpc.RpcError, CallFailed) as exc:
            self.close()
            if self._silent:
                message = f"{self._address} sent nothing, not even a heartbeat, for {self._silence_s:g} s"
                raise errors.StreamSilent(message) from exc
            raise self._failed(exc) from exc
        finally:
            self._waiting_since = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        self._watchdog.join(1.0)  # `close` has woken it.

    def close(self) -> None:
        """Cancels the call. From any thread, any number of times."""
        self._closed.set()
        self._call.cancel()

    def _watch(self) -> None:
        # The call itself has no limit for a single message, so that a thread has to look.
        pause_s = min(1.0, self._silence_s / 4)
        while not self._closed.wait(pause_s):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self._silence_s:
                self._silent = True
                self._call.cancel()
                return


class RawStream(ServerStream):
    """The serialized messages of a call over a connection of its own."""

    def __init__(
        self, call: SocketCall, *, silence_s: float, address: str, failed: Callable[[Any], errors.HeadraceError]
    ) -> None:
        super().__init__(call, silence_s=silence_s, address=address, failed=failed)
        self._socket_call = call

    def tend(self) -> None:
        """Keeps the connection alive while the reader pauses; call it every few seconds."""
        self._waiting_since = time.monotonic()  # A message that stops halfway is silence here too.
        try:
            self._socket_call.tend()
        finally:
            self._waiting_since = None
