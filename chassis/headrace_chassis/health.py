"""The standard health service. A watcher that does not read holds up neither the state nor other watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from headrace_chassis.rpc import Context

# Its type as an annotation, and its states, which are attributes of the class.
_State: TypeAlias = "health_pb2.HealthCheckResponse"
_States = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # Generated, without types.
    """Holds a state for each service; an empty name stands for the server as a whole."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {"": _States.SERVING}
        self._changed = asyncio.Event()
        self._ending = False

    def set(self, service: str, *, serving: bool) -> None:
        """Sets a service's state, unless the server is about to end."""
        self._states[service] = _States.SERVING if serving and not self._ending else _States.NOT_SERVING
        # Each watcher waits for one event; the next change has an event of its own.
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """Says NOT_SERVING for all services from now on."""
        self._ending = True
        for service in self._states:
            self.set(service, serving=False)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> _State:  # noqa: N802
        """Returns a service's state; NOT_FOUND for a service that the server does not have."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _States(status=state)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, _context: Context
    ) -> AsyncGenerator[_State, None]:
        """Yields a service's state now and after each change, as far as the caller reads."""
        last = None
        while True:
            changed, state = self._changed, self._states.get(request.service, _States.SERVICE_UNKNOWN)
            if state != last:
                last = state
                yield _States(status=state)
            else:
                await changed.wait()
