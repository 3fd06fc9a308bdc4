"""The events for one watcher of residencies: a snapshot, then each change, without a gap."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.residency.events import ResidencyEvent
from headrace_registry.wakeups import Wakeups


class ResidencyWatch:
    """One watcher's position in the log: events up to `seq` have been sent; 0 while a snapshot is being sent."""

    def __init__(self, store: EventStore, wakeups: Wakeups, *, model_id: str, after_seq: int) -> None:
        self._store = store
        self._wakeups = wakeups
        self._model_id = model_id
        self.seq = after_seq

    async def events(self) -> AsyncGenerator[ResidencyEvent, None]:
        """Yields the events behind `seq` for ever. Begins with a snapshot if `seq` is 0, or if the log was trimmed."""
        begins = self.seq == 0
        while True:
            seen = self._wakeups.generation
            reading = None if begins else await self._store.after(self.seq, self._model_id)
            if reading is None:
                reading, begins = await self._store.snapshot(self._model_id), False
                self.seq, moved = 0, True
            else:
                moved = reading.seq != self.seq
            for event in reading.events:
                yield event
            self.seq = reading.seq
            if not moved:
                await self._wakeups.wait(seen)
