"""The way to a lease: queued, loading, granted. Every wait ends by `wait_s`, and a caller who leaves leaves nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable

from headrace_registry.errors import AdmissionTimeout, DatabaseUnavailable
from headrace_registry.postgres.residency.residencies import ResidencyStore
from headrace_registry.residency.leases import LeaseTerms
from headrace_registry.residency.wishes import LeaseProgress, Wish
from headrace_registry.wakeups import POLL_S, Wakeups

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0


class LeaseWait:
    """One AcquireLease on its way: `advance` it until it has a lease, then or before `give_up`."""

    def __init__(
        self, residencies: ResidencyStore, wish: Wish, terms: LeaseTerms, *, waiter_id: str, deadline: float
    ) -> None:
        self._residencies = residencies
        self._wish = wish
        self._terms = terms
        self._waiter_id = waiter_id
        self._deadline = deadline
        self._last: LeaseProgress | None = None

    def left_s(self, now: float) -> float:
        """Seconds until it may wait no longer."""
        return self._deadline - now

    async def advance(self, now: float) -> LeaseProgress | None:
        """One step; returns how the wish stands if that changed. Raises AdmissionTimeout, or what refuses it."""
        progress = await self._residencies.step(self._wish, self._terms, self._waiter_id, last=self._last)
        if progress.lease is not None:
            return progress
        changed = _differs(progress, self._last)
        self._last = progress
        if self.left_s(now) <= 0:
            raise await self._timeout(progress)
        return progress if changed else None

    async def give_up(self) -> None:
        """Takes back the lease and the place in line."""
        try:
            await self._residencies.abandon(self._waiter_id)
        except DatabaseUnavailable:
            log.warning("waiter %s could not be taken back; it runs out by itself", self._waiter_id)

    async def _timeout(self, progress: LeaseProgress) -> AdmissionTimeout:
        residency = progress.residency
        assert residency is not None
        holders = ", ".join(await self._residencies.memory_holders(residency.id)) if progress.position else ""
        behind = f" at position {progress.position}, behind {holders}" if holders else ""
        return AdmissionTimeout(
            f"model {self._wish.model_id!r} is still {residency.state}{behind}; "
            "wait longer with wait_s, or try again later",
            metadata={"state": residency.state, "position": str(progress.position), "holders": holders},
            retry_after_s=_RETRY_AFTER_S,
        )


class LeaseWaits:
    """Carries AcquireLease from its first step to its last."""

    def __init__(
        self, *, residencies: ResidencyStore, wakeups: Wakeups, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._residencies = residencies
        self._wakeups = wakeups
        self._clock = clock

    async def acquire(
        self, wish: Wish, terms: LeaseTerms, *, waiter_id: str, wait_s: float
    ) -> AsyncGenerator[LeaseProgress, None]:
        """Yields each change on the way, the lease last. Close it to give up.

        The lease gets the waiter's id. If it is not delivered, because the generator is closed while suspended at that
        yield or the caller left while it was being granted, it is released.
        """
        attempt = LeaseWait(self._residencies, wish, terms, waiter_id=waiter_id, deadline=self._clock() + wait_s)
        delivered = False
        try:
            while not delivered:
                seen = self._wakeups.generation
                progress = await attempt.advance(self._clock())
                if progress is not None:
                    yield progress
                    delivered = progress.lease is not None
                if not delivered:
                    left_s = attempt.left_s(self._clock())
                    await self._wakeups.wait(seen, timeout_s=max(0.0, min(POLL_S, left_s)))
        finally:
            if not delivered:
                await attempt.give_up()


def _differs(progress: LeaseProgress, last: LeaseProgress | None) -> bool:
    now, before = progress.residency, last.residency if last is not None else None
    if last is None or now is None or before is None:
        return True
    return (now.id, now.state, now.transfer, progress.position) != (
        before.id,
        before.state,
        before.transfer,
        last.position,
    )
