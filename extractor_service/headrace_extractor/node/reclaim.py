"""Ends runners and makes sure of their memory: the process is gone, and on a GPU the driver has it back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace_extractor.node.ports import Runner
from headrace_extractor.node.values import Device

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


# An allocator of the driver keeps a little; less than this missing is not worth an alarm.
_BACK_SHARE = 0.75


@dataclass(eq=False)
class Loss:
    """Bytes of one runner. Back once its process ended, or, where it did, once the device has `wanted_free_bytes`."""

    device_id: str
    ended: Callable[[], bool]
    n_bytes: int = 0
    wanted_free_bytes: int = 0

    def is_back(self, free_bytes: int) -> bool:
        """True once nothing of it is missing any more."""
        return self.ended() and free_bytes >= self.wanted_free_bytes


@dataclass(eq=False)
class Level:
    """What was free on a device with a model on it: what its end is compared with, should its process end by itself."""

    device_id: str
    free_bytes: int


class Losses:
    """All that is missing on this node."""

    def __init__(self) -> None:
        self._losses: list[Loss] = []
        self._levels: list[Level] = []

    def watch(self, level: Level) -> None:
        """Keeps a level up to date from now on."""
        self._levels.append(level)

    def unwatch(self, level: Level) -> None:
        """Forgets a level."""
        self._levels = [each for each in self._levels if each is not level]

    def add(self, loss: Loss) -> None:
        """Notes what did not come back."""
        self._losses.append(loss)

    def remove(self, loss: Loss) -> None:
        """Forgets one that is back after all."""
        self._losses = [each for each in self._losses if each is not loss]

    def taken(self, device_id: str, n_bytes: int) -> None:
        """Notes that a model took memory of a device (negative: gave it back): less shall be free there."""
        for loss in self._losses:
            if loss.device_id == device_id and loss.wanted_free_bytes:
                loss.wanted_free_bytes -= n_bytes
        for level in self._levels:
            if level.device_id == device_id:
                level.free_bytes -= n_bytes

    def marked(self, devices: Sequence[Device]) -> tuple[Device, ...]:
        """Returns the devices with their lost bytes, and forgets what is back."""
        free = {device.id: device.free_bytes for device in devices}
        self._losses = [loss for loss in self._losses if not loss.is_back(free.get(loss.device_id, 0))]
        return tuple(replace(device, lost_bytes=self._lost_bytes(device.id)) for device in devices)

    def _lost_bytes(self, device_id: str) -> int:
        return sum(loss.n_bytes for loss in self._losses if loss.device_id == device_id)


def free_wanted(free_before_bytes: int, held_bytes: int) -> int:
    """How much shall be free on a device once `held_bytes` are back."""
    return free_before_bytes + int(held_bytes * _BACK_SHARE)
