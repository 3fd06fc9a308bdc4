"""The wait for a lease: queued, loading, granted.

Every wait ends by `wait_s`, and a call that ends without a lease leaves no waiter and no lease behind.
"""

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
    """The wait of one AcquireLease: `advance` it until it has a lease; `give_up` if the lease is not wanted."""

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
        """Returns the seconds until the deadline; negative after it."""
        return self._deadline - now

    async def advance(self, now: float) -> LeaseProgress | None:
        """Takes one step; returns the progress if it changed.

        Raises AdmissionTimeout after the deadline, or the error that refuses the wish.
        """
        progress = await self._residencies.step(self._wish, self._terms, self._waiter_id, last=self._last)
        if progress.lease is not None:
            return progress
        changed = _differs(progress, self._last)
        self._last = progress
        if self.left_s(now) <= 0:
            raise await self._timeout(progress)
        return progress if changed else None

    async def give_up(self) -> None:
        """Takes back the lease and the waiter."""
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
    """Runs AcquireLease calls from their first step to their last."""

    def __init__(
        self, *, residencies: ResidencyStore, wakeups: Wakeups, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._residencies = residencies
        self._wakeups = wakeups
        self._clock = clock

    async def acquire(
        self, wish: Wish, terms: LeaseTerms, *, waiter_id: str, wait_s: float
    ) -> AsyncGenerator[LeaseProgress, None]:
        """Yields each change of the progress, the lease last. Close the generator to give up.

        The lease gets the waiter's id. It is released if it is not delivered: if the generator is closed while
        suspended at that yield, or if the caller leaves while the lease is being granted.
        """
        waiting = LeaseWait(self._residencies, wish, terms, waiter_id=waiter_id, deadline=self._clock() + wait_s)
        delivered = False
        try:
            while not delivered:
                seen = self._wakeups.generation
                progress = await waiting.advance(self._clock())
                if progress is not None:
                    yield progress
                    delivered = progress.lease is not None
                if not delivered:
                    left_s = waiting.left_s(self._clock())
                    await self._wakeups.wait(seen, timeout_s=max(0.0, min(POLL_S, left_s)))
        finally:
            if not delivered:
                await waiting.give_up()


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
