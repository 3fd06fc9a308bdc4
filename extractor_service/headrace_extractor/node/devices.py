"""What memory this node has for models, found without loading a framework."""

from __future__ import annotations

import functools
import importlib.util
import logging
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from headrace_chassis.errors import StartError
from headrace_extractor.node.values import Device, Machine

# Of the machine's memory; the rest is for the page cache, which serves readers, and for everything else.
DEFAULT_CPU_SHARE = 0.6
_QUERY = "--query-gpu=index,name,memory.total,memory.free"
_QUERY_DEADLINE_S = 10.0
_MIB = 1024 * 1024
# Left to the driver, other processes and fragmentation.
_GPU_SHARE = 0.92
_FLASH_ATTENTION_MAJOR = 8
# Below this a few models fill a node, and each more is likely somebody's mistake.
_SMALL_NODE_BYTES = 64 * 10**9
_SMALL_NODE_RESIDENTS = 3
DEFAULT_MAX_LOADS = 2

logger = logging.getLogger(__name__)


def device_lister(wanted: str, cpu_bytes: int) -> Callable[[], Sequence[Device]]:
    """Returns a function that lists the devices: `wanted`, or all GPUs, or the CPU where there are none.

    Raises StartError for a GPU that is not there. A driver that does not answer later has its GPUs listed as they were.
    """
    known = _wanted_gpus(wanted) if wanted.partition(":")[0] in ("", "cuda") else ()
    if not known:
        if wanted.startswith("cuda"):
            raise StartError(
                f"--device {wanted}: nvidia-smi lists no such GPU; look at what it answers, or start with --device cpu."
            )
        kind = wanted or _kind_without_gpu()
        return lambda: (_memory(kind, kind, cpu_bytes),)
    answers = True

    def gpus() -> Sequence[Device]:
        nonlocal known, answers
        found = _wanted_gpus(wanted)
        if answers and not found:
            logger.warning("nvidia-smi does not list the GPUs any more; they are reported as they were")
        answers, known = bool(found), found or known
        return known

    return gpus


def _wanted_gpus(wanted: str) -> tuple[Device, ...]:
    return tuple(device for device in _cuda_devices() if wanted in ("", "cuda", device.id))


def _kind_without_gpu() -> str:
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return "mps" if apple else "cpu"


def machine_reader(devices: Sequence[Device], *, max_loads: int, max_residents: int | None) -> Callable[[], Machine]:
    """Returns a function that reads the machine's memory; `max_residents` None: 3 on a small node, else no limit."""
    if max_residents is None:
        small = sum(device.capacity_bytes for device in devices) < _SMALL_NODE_BYTES
        max_residents = _SMALL_NODE_RESIDENTS if small else 0

    def machine() -> Machine:
        memory = psutil.virtual_memory()
        return Machine(
            memory_bytes=memory.total,
            memory_free_bytes=memory.available,
            max_loads=max_loads,
            max_residents=max_residents,
        )

    return machine


def _memory(device_id: str, kind: str, capacity_bytes: int) -> Device:
    memory = psutil.virtual_memory()
    return Device(
        id=device_id,
        kind=kind,
        name=_cpu_name(),
        capacity_bytes=capacity_bytes or int(memory.total * DEFAULT_CPU_SHARE),
        free_bytes=memory.available,
        total_bytes=memory.total,
    )


@functools.cache
def _cpu_name() -> str:
    """Such as `AMD EPYC 9454`; where the system does not tell, the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cuda_devices() -> tuple[Device, ...]:
    # Old drivers do not know the capability and refuse the whole question.
    lines = _asked(f"{_QUERY},compute_cap") or _asked(_QUERY)
    flash_attention = importlib.util.find_spec("flash_attn") is not None
    return tuple(_cuda_device(line, flash_attention) for line in lines)


def _asked(query: str) -> list[str]:
    """The lines that nvidia-smi answers; none where there is no such program or it fails."""
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
    return [line for line in answer.stdout.splitlines() if line.count(",") >= 3]


def _cuda_device(line: str, flash_attention: bool) -> Device:
    index, name, total, free, capability = (*(part.strip() for part in line.split(",")), "")[:5]
    return Device(
        id=f"cuda:{index}",
        kind="cuda",
        name=name,
        capacity_bytes=int(int(total) * _MIB * _GPU_SHARE),
        free_bytes=int(free) * _MIB,
        total_bytes=int(total) * _MIB,
        capability=capability,
        flash_attention=flash_attention and _runs_flash_attention(capability),
    )


def _runs_flash_attention(capability: str) -> bool:
    """True from Ampere on."""
    major, _, _ = capability.partition(".")
    return major.isdigit() and int(major) >= _FLASH_ATTENTION_MAJOR
