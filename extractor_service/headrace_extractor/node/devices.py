"""Finds this node's devices and their memory without loading a framework, which would take memory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from headrace_chassis.errors import StartError
from headrace_extractor.node.values import Device, Machine

# Models on the CPU get this share of the machine's memory. The rest is for the page cache, which serves readers, and
# for all other processes.
DEFAULT_CPU_SHARE = 0.6
_QUERY = "--query-gpu=index,name,memory.total,memory.free"
_QUERY_DEADLINE_S = 10.0
_MIB = 1024 * 1024
# Models get this share of a GPU. The rest is for the driver, other processes and fragmentation.
_GPU_SHARE = 0.92
_FLASH_ATTENTION_MAJOR = 8  # Ampere, the first generation with FlashAttention 2.
# Below this size a few models fill a node, and a further one was most likely loaded by mistake.
_SMALL_NODE_BYTES = 64 * 10**9
_SMALL_NODE_RESIDENTS = 3
DEFAULT_MAX_LOADS = 2

logger = logging.getLogger(__name__)


def device_lister(wanted: str, cpu_bytes: int) -> Callable[[], Sequence[Device]]:
    """Returns a function that lists the devices: `wanted`, or all GPUs, or the CPU of a machine without GPUs.

    Raises StartError if `wanted` names a GPU that the machine does not have. GPUs that the driver stops listing later
    are reported with their last known figures.
    """
    known = _cuda_devices(wanted) if wanted.partition(":")[0] in ("", "cuda") else ()
    if not known:
        if wanted.startswith("cuda"):
            raise StartError(
                f"--device {wanted}: nvidia-smi lists no such GPU; look at what it answers, or start with --device cpu."
            )
        apple = platform.system() == "Darwin" and platform.machine() == "arm64"
        kind = wanted or ("mps" if apple else "cpu")

        read_memory = _memory_reader()

        def main_memory() -> Sequence[Device]:
            memory = read_memory()
            cpu = Device(
                id=kind,
                kind=kind,
                name=_cpu_name(),
                capacity_bytes=cpu_bytes or int(memory.total * DEFAULT_CPU_SHARE),
                free_bytes=memory.available,
                total_bytes=memory.total,
            )
            return (cpu,)

        return main_memory

    answers = True

    def gpus() -> Sequence[Device]:
        nonlocal known, answers
        found = _cuda_devices(wanted)
        if answers and not found:
            logger.warning("nvidia-smi does not list the GPUs any more; they are reported as they were")
        answers, known = bool(found), found or known
        return known

    return gpus


def machine_reader(devices: Sequence[Device], *, max_loads: int, max_residents: int | None) -> Callable[[], Machine]:
    """Returns a function that reads the machine's memory; `max_residents` None: 3 on a small node, else no limit."""
    if max_residents is None:
        small = sum(device.capacity_bytes for device in devices) < _SMALL_NODE_BYTES
        max_residents = _SMALL_NODE_RESIDENTS if small else 0

    read_memory = _memory_reader()

    def machine() -> Machine:
        memory = read_memory()
        return Machine(
            memory_bytes=memory.total,
            memory_free_bytes=memory.available,
            max_loads=max_loads,
            max_residents=max_residents,
        )

    return machine


async def free_bytes(devices: Callable[[], Sequence[Device]], device_id: str) -> int:
    """Returns the bytes that are free on a device now; 0 if it is not listed."""
    # In a thread: nvidia-smi may take seconds.
    listed = await asyncio.to_thread(devices)
    return next((device.free_bytes for device in listed if device.id == device_id), 0)


def _memory_reader() -> Callable[[], Any]:
    """Returns a function that reads the main memory; its last known figures while the system has no file to spare."""
    known = psutil.virtual_memory()

    def read() -> Any:
        nonlocal known
        with contextlib.suppress(OSError):
            known = psutil.virtual_memory()
        return known

    return read


@functools.cache
def _cpu_name() -> str:
    """Returns a name such as `AMD EPYC 9454`, or the architecture on systems without /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cuda_devices(wanted: str) -> tuple[Device, ...]:
    """Lists the GPU with the id `wanted`, or all GPUs for "" and "cuda"."""
    # Old drivers do not know the capability and refuse the whole query.
    lines = _query_nvidia_smi(f"{_QUERY},compute_cap") or _query_nvidia_smi(_QUERY)
    has_flash_attention = importlib.util.find_spec("flash_attn") is not None
    devices = []
    for line in lines:
        index, name, total, free, capability = (*(part.strip() for part in line.split(",")), "")[:5]
        major = capability.partition(".")[0]
        devices.append(
            Device(
                id=f"cuda:{index}",
                kind="cuda",
                name=name,
                capacity_bytes=int(int(total) * _MIB * _GPU_SHARE),
                free_bytes=int(free) * _MIB,
                total_bytes=int(total) * _MIB,
                capability=capability,
                flash_attention=has_flash_attention and major.isdigit() and int(major) >= _FLASH_ATTENTION_MAJOR,
            )
        )
    return tuple(device for device in devices if wanted in ("", "cuda", device.id))


def _query_nvidia_smi(query: str) -> list[str]:
    """Returns the lines that nvidia-smi answers; none if the program is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(  # noqa: S603 -- a fixed command
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_DEADLINE_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        return []
    # Messages such as "No devices were found" come on standard output too.
    return [line for line in answer.stdout.splitlines() if line.count(",") >= 3]
