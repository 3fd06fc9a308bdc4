"""What a watcher of residencies is sent: a snapshot, then each change; never a gap."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.residency.events import ResidencyEvent
from headrace_registry.wakeups import Wakeups


class ResidencyWatch:
    """One watcher's way through the log. `seq`: everything up to it has been sent; 0 while a snapshot is."""

    def __init__(self, store: EventStore, wakeups: Wakeups, *, model_id: str, after_seq: int) -> None:
        self._store = store
        self._wakeups = wakeups
        self._model_id = model_id
        self.seq = after_seq

    async def events(self) -> AsyncGenerator[ResidencyEvent, None]:
        """Yields events for ever, those behind `seq`; a snapshot first with 0, and wherever these are gone."""
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
