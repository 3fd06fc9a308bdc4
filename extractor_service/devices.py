"""What memory this node has for models, found without loading a framework."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence

import psutil

from extractor_service.values import Device

# Of the machine's memory; the rest is for the page cache, which serves readers, and for everything else.
DEFAULT_CPU_SHARE = 0.6
_QUERY = "--query-gpu=index,name,memory.total,memory.free"
_QUERY_DEADLINE_S = 10.0
_MIB = 1024 * 1024
# Left to the driver, other processes and fragmentation.
_GPU_SHARE = 0.92


def device_lister(wanted: str, cpu_bytes: int) -> Callable[[], Sequence[Device]]:
    """Returns a function that lists the devices: `wanted`, or all GPUs, or the CPU where there are none."""
    kind = wanted or _best_kind()

    def devices() -> Sequence[Device]:
        if kind.startswith("cuda"):
            found = tuple(device for device in _cuda_devices() if wanted in ("", "cuda", device.id))
            if found:
                return found
        if kind == "mps":
            return (_memory("mps", "mps", cpu_bytes),)
        return (_memory("cpu", "cpu", cpu_bytes),)

    return devices


def _best_kind() -> str:
    if _cuda_devices():
        return "cuda"
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return "mps" if apple else "cpu"


def _memory(device_id: str, kind: str, capacity_bytes: int) -> Device:
    memory = psutil.virtual_memory()
    return Device(
        id=device_id,
        kind=kind,
        name=platform.processor() or platform.machine(),
        capacity_bytes=capacity_bytes or int(memory.total * DEFAULT_CPU_SHARE),
        free_bytes=memory.available,
    )


def _cuda_devices() -> tuple[Device, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run(  # noqa: S603 -- a fixed command
            [program, _QUERY, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_DEADLINE_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        return ()
    return tuple(_cuda_device(line) for line in answer.stdout.splitlines() if line.count(",") == 3)


def _cuda_device(line: str) -> Device:
    index, name, total, free = (part.strip() for part in line.split(","))
    return Device(
        id=f"cuda:{index}",
        kind="cuda",
        name=name,
        capacity_bytes=int(int(total) * _MIB * _GPU_SHARE),
        free_bytes=int(free) * _MIB,
    )
