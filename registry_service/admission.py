"""The way to a lease: queued, loading, granted. Every wait ends by `wait_s`, and a caller who leaves leaves nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from registry_service.errors import AdmissionTimeout, DatabaseUnavailable
from registry_service.postgres.admit import Wish
from registry_service.postgres.residency_store import Admission, LeaseTerms, ResidencyStore
from registry_service.wakeups import POLL_S, Wakeups

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0


class Admissions:
    """Carries AcquireLease from its first step to its last."""

    def __init__(self, *, residencies: ResidencyStore, wakeups: Wakeups) -> None:
        self._residencies = residencies
        self._wakeups = wakeups

    async def acquire(
        self, wish: Wish, terms: LeaseTerms, *, waiter_id: str, wait_s: float
    ) -> AsyncGenerator[Admission, None]:
        """Yields each change on the way, the lease last. Close it to give up.

        The lease gets the waiter's id. If it is not delivered, because the generator is closed while suspended at that
        yield or the caller left while it was being granted, it is released.
        """
        delivered = False
        try:
            async with aclosing(self._steps(wish, terms, waiter_id, time.monotonic() + wait_s)) as steps:
                async for admission in steps:
                    yield admission
            delivered = True
        finally:
            if not delivered:
                await self._take_back(waiter_id)

    async def _steps(
        self, wish: Wish, terms: LeaseTerms, waiter_id: str, deadline: float
    ) -> AsyncGenerator[Admission, None]:
        last: Admission | None = None
        while True:
            seen = self._wakeups.generation
            awaited = last.residency.id if last is not None else ""
            admission = await self._residencies.step(wish, terms, waiter_id, awaited=awaited)
            if admission.lease is not None:
                yield admission
                return
            if _differs(admission, last):
                yield admission
            last = admission
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise _timeout(wish, admission)
            await self._wakeups.wait(seen, timeout_s=min(POLL_S, left_s))

    async def _take_back(self, waiter_id: str) -> None:
        try:
            await self._residencies.abandon(waiter_id)
        except DatabaseUnavailable:
            log.warning("waiter %s could not be taken back; it runs out by itself", waiter_id)


def _differs(admission: Admission, last: Admission | None) -> bool:
    if last is None:
        return True
    now, before = admission.residency, last.residency
    return (now.id, now.state, now.transfer, admission.position) != (
        before.id,
        before.state,
        before.transfer,
        last.position,
    )


def _timeout(wish: Wish, admission: Admission) -> AdmissionTimeout:
    return AdmissionTimeout(
        f"model {wish.model_id!r} is still {admission.residency.state}; wait longer with wait_s, or try again later",
        metadata={"state": admission.residency.state, "position": str(admission.position)},
        retry_after_s=_RETRY_AFTER_S,
    )
