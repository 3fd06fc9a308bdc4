"""The limits of a child process, and how a process puts them on itself."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits for one function. Both times begin anew with each item, so that a long stream has no end by time."""

    memory_bytes: int = 1024 * _MIB  # Private memory, which a child shares with no other process.
    cpu_s: int = 20  # Whole seconds of computing, over all threads.
    wall_s: float = 40.0
    output_bytes: int = 8 * _MIB  # One message; the server holds one at a time.


def limit_memory(limits: Limits) -> None:
    """Has allocations beyond the limit fail in this process, which leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # Elsewhere the system takes such limits and does not hold them.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = limits.memory_bytes if hard == resource.RLIM_INFINITY else min(limits.memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def allow_cpu(limits: Limits) -> None:
    """Allows this process the seconds of the limits from now on; the system ends it after them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + 1 + limits.cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
