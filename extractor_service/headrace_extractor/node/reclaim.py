"""Ends runners, and accounts for the device memory that does not come back.

Main memory is back as soon as the process is gone. A GPU's driver takes a moment longer and may keep some bytes, and a
process that can't be killed keeps all of its memory. Such bytes are a `Loss`: the node reports them with its devices
until a later look at the device shows that they are back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace_extractor.node.devices import free_bytes
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.values import Device

# The driver takes a moment after the process has gone; longer is a leak.
BACK_DEADLINE_S = 10.0
_LOOK_EVERY_S = 0.25
# A driver's allocator keeps a little for itself; a quarter missing is not worth an alarm.
_BACK_SHARE = 0.75

logger = logging.getLogger(__name__)


class Reclaimer:
    """Ends runners and keeps the losses of all devices of this node."""

    def __init__(self, devices: Callable[[], Sequence[Device]], *, deadline_s: float = BACK_DEADLINE_S) -> None:
        self._devices = devices
        self._deadline_s = deadline_s
        self._losses: list[Loss] = []
        self._baselines: list[Baseline] = []

    async def end(self, runner: Runner, *, device_id: str, size_bytes: int, baseline: Baseline | None = None) -> int:
        """Ends a runner that takes `size_bytes` of a device; returns the bytes that did not come back in time.

        `baseline` is the figure noted after its model was loaded; see `Baseline`.
        """
        free_before = await free_bytes(self._devices, device_id) if device_id.startswith("cuda") else 0
        if baseline:
            free_before = min(free_before, baseline.free_bytes)
            self._baselines = [each for each in self._baselines if each is not baseline]
        try:
            await runner.kill()
        except TimeoutError:
            logger.error("runner on %s can't be ended; %d bytes are lost while it lives", device_id, size_bytes)  # noqa: TRY400
            ended = asyncio.ensure_future(runner.wait()).done
            self._losses.append(Loss(device_id=device_id, n_bytes=size_bytes, ended=ended))
            return size_bytes
        if not free_before:  # Main memory is back with the process.
            return 0
        wanted_free_bytes = free_before + int(size_bytes * _BACK_SHARE)
        loss = Loss(device_id=device_id, ended=lambda: True, wanted_free_bytes=wanted_free_bytes)
        # Listed while it waits: a model loaded meanwhile lowers the free bytes that it waits for.
        self._losses.append(loss)
        deadline = time.monotonic() + self._deadline_s
        while True:
            free = await free_bytes(self._devices, device_id)
            if loss.is_back(free):
                self._losses = [each for each in self._losses if each is not loss]
                self.note_load(device_id, -size_bytes)
                return 0
            if time.monotonic() >= deadline:
                loss.n_bytes = max(0, size_bytes - max(0, free - free_before))
                logger.error("%s did not get back %d of %d bytes", device_id, loss.n_bytes, size_bytes)
                return loss.n_bytes
            await asyncio.sleep(_LOOK_EVERY_S)

    async def note_baseline(self, device_id: str) -> Baseline | None:
        """Notes the free bytes of a GPU right after a model was loaded on it; None for main memory."""
        if not device_id.startswith("cuda"):
            return None
        baseline = Baseline(device_id, await free_bytes(self._devices, device_id))
        self._baselines.append(baseline)
        return baseline

    def note_load(self, device_id: str, n_bytes: int) -> None:
        """Notes that a model took `n_bytes` of a device (negative: gave them back), which are not free any more."""
        for loss in self._losses:
            if loss.device_id == device_id and loss.wanted_free_bytes:
                loss.wanted_free_bytes -= n_bytes
        for baseline in self._baselines:
            if baseline.device_id == device_id:
                baseline.free_bytes -= n_bytes

    def with_losses(self, devices: Sequence[Device]) -> tuple[Device, ...]:
        """Returns the devices with their lost bytes, and forgets the losses that these devices have back."""
        free = {device.id: device.free_bytes for device in devices}
        self._losses = [loss for loss in self._losses if not loss.is_back(free.get(loss.device_id, 0))]
        lost = {
            device.id: sum(loss.n_bytes for loss in self._losses if loss.device_id == device.id) for device in devices
        }
        return tuple(replace(device, lost_bytes=lost[device.id]) for device in devices)


@dataclass(eq=False)
class Loss:
    """Bytes of one runner: back once its process has ended and the device has `wanted_free_bytes` free."""

    device_id: str
    ended: Callable[[], bool]
    n_bytes: int = 0
    wanted_free_bytes: int = 0  # 0 where the end of the process is enough.

    def is_back(self, free_bytes: int) -> bool:
        """True once none of the bytes is missing any more."""
        return self.ended() and free_bytes >= self.wanted_free_bytes


@dataclass(eq=False)
class Baseline:
    """Free bytes of a device with a certain model loaded, adjusted whenever another model is loaded or unloaded.

    A runner that dies by itself may have given its memory back before the node asks the driver; the free bytes after
    its death are compared with this figure instead.
    """

    device_id: str
    free_bytes: int
