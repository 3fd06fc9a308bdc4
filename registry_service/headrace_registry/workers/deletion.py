"""Deletes models; a resident model is unloaded first, and forgotten once its devices have the memory back."""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace_registry.errors import ModelInUse
from headrace_registry.postgres.models.models import ModelStore
from headrace_registry.postgres.requests import Request
from headrace_registry.wakeups import POLL_S, Wakeups

# Less than the usual deadline of a client's call, so that its error can name the devices that it waited for.
_DEADLINE_S = 20.0
_RETRY_AFTER_S = 5.0


class Deletions:
    """Carries out DeleteModel, with all steps of a forced one."""

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
        """Deletes a model. Raises ModelInUse: at once, or with `force` if a device keeps the memory for too long."""
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
            etag = ""  # Checked when the unload began; a change since then does not stop the deletion.
            await self._wakeups.wait(seen, timeout_s=min(POLL_S, left_s))
