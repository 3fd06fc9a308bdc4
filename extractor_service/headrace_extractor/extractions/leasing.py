"""A leased model's runner, for the length of a block."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import LeaseLost, RegistryUnavailable
from headrace_extractor.extractions.ports import Models
from headrace_extractor.meters import Transfer
from headrace_extractor.node.node import Node
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.values import Assignment, Lease

LEASE_WAIT_S = 600.0
RUNNER_WAIT_S = 60.0

logger = logging.getLogger(__name__)


class Leasing:
    """Leases one model for one purpose; `holder` is what others read of it."""

    def __init__(self, models: Models, node: Node, *, model_id: str, tell: Callable[[Transfer | int], None]) -> None:
        self._models = models
        self._node = node
        self._model_id = model_id
        self._tell = tell
        self._lease: Lease | None = None

    @contextlib.asynccontextmanager
    async def runner(self, holder: str) -> AsyncIterator[tuple[Runner, Assignment]]:
        """Acquires a lease and keeps it while the block runs; progress of the wait goes to `tell`.

        Yields the runner, and what it has loaded.
        """
        self._lease = lease = await self._acquire(holder)
        renewing = asyncio.create_task(self._renew(holder), name=f"renew {holder}")
        try:
            yield await self._node.runner_for(lease.residency_id, RUNNER_WAIT_S)
        finally:
            await _to_its_end(self._release(renewing, lease))

    async def _release(self, renewing: asyncio.Task[None], lease: Lease) -> None:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        held, self._lease = self._lease or lease, None
        with contextlib.suppress(ServiceError):
            await self._models.release_lease(held)

    async def _acquire(self, holder: str) -> Lease:
        await self._node.until_registered(RUNNER_WAIT_S)
        asking = self._models.acquire_lease(self._model_id, holder=holder, wait_s=LEASE_WAIT_S)
        async with contextlib.aclosing(asking) as events:
            async for event in events:
                if isinstance(event, Lease):
                    return event
                self._tell(event)
        raise RegistryUnavailable("The registry ended the stream of a lease before granting it.", retry_after_s=1.0)

    async def _renew(self, holder: str) -> None:
        """Keeps the lease; while the registry is away, and after the lease was lost, the model simply stays loaded."""
        while lease := self._lease:
            await asyncio.sleep(lease.ttl_s / 3)
            try:
                await self._models.renew_lease(lease)
            except RegistryUnavailable:
                logger.info("lease %s can't be renewed now: the registry is away", lease.id)
            except LeaseLost:
                logger.warning("lease %s was lost; a new one is asked for", lease.id)
                with contextlib.suppress(ServiceError):
                    self._lease = await self._acquire(holder)
            except ServiceError as exc:
                logger.warning("lease %s can't be renewed: %s", lease.id, exc.message)


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Sees short work through, also when whoever waits for it is cancelled."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
