"""Deleting a model that is in memory: sends it off first, and forgets it once its memory is back."""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace_registry.errors import ModelInUse
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.postgres.requests import Request
from headrace_registry.wakeups import POLL_S, Wakeups

# Less than the deadline clients usually give a call: they shall hear what it waits for.
_DEADLINE_S = 20.0
_RETRY_AFTER_S = 5.0


class Deletions:
    """Carries DeleteModel with force from its first step to its last."""

    def __init__(
        self,
        *,
        models: ModelStore,
        wakeups: Wakeups,
        deadline_s: float = _DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._wakeups = wakeups
        self._deadline_s = deadline_s
        self._clock = clock

    async def delete(self, model_id: str, *, force: bool, etag: str, actor: str, request: Request) -> None:
        """Forgets a model. Raises ModelInUse: at once without `force`, else when its memory does not come back."""
        end = self._clock() + self._deadline_s
        while True:
            seen = self._wakeups.generation
            places = await self._models.delete(model_id, force=force, etag=etag, actor=actor, request=request)
            if not places:
                return
            left_s = end - self._clock()
            if left_s <= 0:
                raise ModelInUse(
                    f"model {model_id!r} is sent off, but {', '.join(places)} did not give its memory back in "
                    f"{self._deadline_s:.0f} s; look at these nodes and delete it again",
                    metadata={"holders": "", "places": ", ".join(places)},
                    resource=("model", model_id),
                    retry_after_s=_RETRY_AFTER_S,
                )
            etag = ""  # It was right when the unload began.
            await self._wakeups.wait(seen, timeout_s=min(POLL_S, left_s))
