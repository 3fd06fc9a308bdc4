"""A lease on a model, and the runner that holds the model, for the length of a block."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import LeaseLost, RegistryUnavailable
from headrace_extractor.extractions.ports import Models, QueuePosition
from headrace_extractor.meters import Transfer
from headrace_extractor.node.node import Node
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.values import Assignment, Lease

# Long enough for a large model to be loaded from a slow disk.
LEASE_WAIT_S = 600.0
# The registry has granted the lease, so the model is loaded: this node needs only to hear of it.
RUNNER_WAIT_S = 60.0

logger = logging.getLogger(__name__)


class Leasing:
    """Leases one model; `holder` is the name that other users of the registry see."""

    def __init__(
        self,
        models: Models,
        node: Node,
        *,
        model_id: str,
        holder: str,
        tell: Callable[[Transfer | QueuePosition], None],
    ) -> None:
        self._models = models
        self._node = node
        self._model_id = model_id
        self._holder = holder
        self._tell = tell
        self._lease: Lease | None = None

    @contextlib.asynccontextmanager
    async def runner(self) -> AsyncIterator[tuple[Runner, Assignment]]:
        """Acquires a lease and renews it while the block runs; `tell` hears of the queue and of loading.

        Yields the runner and the assignment that it carries out.
        """
        self._lease = lease = await self._acquire()
        renewing = asyncio.create_task(self._renew(), name=f"renew {self._holder}")
        try:
            yield await self._node.runner_for(lease.residency_id, RUNNER_WAIT_S)
        finally:
            # Releasing takes a moment, and must not be cut off when the block is cancelled.
            releasing = asyncio.create_task(self._release(renewing, lease))
            try:
                await asyncio.shield(releasing)
            except asyncio.CancelledError:
                await asyncio.wait([releasing])
                raise

    async def _release(self, renewing: asyncio.Task[None], lease: Lease) -> None:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        held, self._lease = self._lease or lease, None
        with contextlib.suppress(ServiceError):
            await self._models.release_lease(held)

    async def _acquire(self) -> Lease:
        await self._node.until_registered(RUNNER_WAIT_S)
        asking = self._models.acquire_lease(self._model_id, holder=self._holder, wait_s=LEASE_WAIT_S)
        async with contextlib.aclosing(asking) as events:
            async for event in events:
                if isinstance(event, Lease):
                    return event
                self._tell(event)
        raise RegistryUnavailable("The registry ended the stream of a lease before granting it.", retry_after_s=1.0)

    async def _renew(self) -> None:
        """Renews the lease at a third of its life. If that fails, the model stays loaded and in use all the same."""
        while lease := self._lease:
            await asyncio.sleep(lease.ttl_s / 3)
            try:
                await self._models.renew_lease(lease)
            except RegistryUnavailable:
                logger.info("lease %s can't be renewed now: the registry is away", lease.id)
            except LeaseLost:
                logger.warning("lease %s was lost; a new one is asked for", lease.id)
                with contextlib.suppress(ServiceError):
                    self._lease = await self._acquire()
            except ServiceError as exc:
                logger.warning("lease %s can't be renewed: %s", lease.id, exc.message)
