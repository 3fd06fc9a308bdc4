"""Memory that ended runners did not give back: told to the registry, which counts it as held, until it is back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace_extractor.values import Device

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
