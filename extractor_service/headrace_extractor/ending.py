"""Ends runners and makes sure of their memory: the process is gone, and on a GPU the driver has it back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from headrace_extractor.losses import Level, Loss, Losses, free_wanted
from headrace_extractor.ports import Runner
from headrace_extractor.values import Device

# The driver takes a moment after the process has gone; longer is a leak.
BACK_DEADLINE_S = 10.0
_LOOK_EVERY_S = 0.25

logger = logging.getLogger(__name__)


class Endings:
    """Ends runners one way or the other; what they keep is in `losses`."""

    def __init__(
        self,
        devices: Callable[[], Sequence[Device]],
        losses: Losses,
        *,
        deadline_s: float = BACK_DEADLINE_S,
    ) -> None:
        self._devices = devices
        self._losses = losses
        self._deadline_s = deadline_s

    async def level_of(self, device_id: str) -> Level | None:
        """Notes what is free on a GPU with a model that was just loaded; None for main memory."""
        if not device_id.startswith("cuda"):
            return None
        level = Level(device_id, await self._free_bytes(device_id))
        self._losses.watch(level)
        return level

    async def end(self, runner: Runner, *, device_id: str, held_bytes: int, level: Level | None = None) -> int:
        """Ends a runner that holds so much of a device. Returns the bytes that did not come back in time.

        `level` is that of its model: a process that died may have given its memory back before anybody looks.
        """
        free_before = await self._free_bytes(device_id) if device_id.startswith("cuda") else 0
        if level:
            free_before = min(free_before, level.free_bytes)
            self._losses.unwatch(level)
        try:
            await runner.kill()
        except TimeoutError:
            logger.error("runner on %s can't be ended; %d bytes are lost while it lives", device_id, held_bytes)  # noqa: TRY400
            self._losses.add(_of_living(runner, device_id, held_bytes))
            return held_bytes
        if not free_before:  # Main memory is back with the process.
            return 0
        loss = Loss(device_id=device_id, ended=lambda: True, wanted_free_bytes=free_wanted(free_before, held_bytes))
        self._losses.add(loss)  # What is loaded meanwhile lowers what it waits for.
        free = await self._until_back(loss)
        if loss.is_back(free):
            self._losses.remove(loss)
            self._losses.taken(device_id, -held_bytes)
            return 0
        loss.n_bytes = max(0, held_bytes - max(0, free - free_before))
        logger.error("%s did not get back %d of %d bytes", device_id, loss.n_bytes, held_bytes)
        return loss.n_bytes

    async def _until_back(self, loss: Loss) -> int:
        end = time.monotonic() + self._deadline_s
        while True:
            free = await self._free_bytes(loss.device_id)
            if loss.is_back(free) or time.monotonic() >= end:
                return free
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _free_bytes(self, device_id: str) -> int:
        devices = await asyncio.to_thread(self._devices)
        return next((device.free_bytes for device in devices if device.id == device_id), 0)


def _of_living(runner: Runner, device_id: str, held_bytes: int) -> Loss:
    waiting = asyncio.ensure_future(runner.wait())
    return Loss(device_id=device_id, n_bytes=held_bytes, ended=waiting.done)
