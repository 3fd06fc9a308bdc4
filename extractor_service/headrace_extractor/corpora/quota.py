"""The limit on the disk space of all corpora together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from headrace_extractor.errors import DiskFull


class Quota:
    """Counts bytes under a limit; may be used from several threads."""

    def __init__(self, root: Path, *, limit_bytes: int, used_bytes: int) -> None:
        self._root = root
        self._limit = limit_bytes
        self._used = used_bytes
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes counted now."""
        return self._used

    def take(self, n_bytes: int, *, forced: bool = False) -> None:
        """Counts bytes before they are written; raises DiskFull beyond the limit, unless `forced` for written bytes."""
        with self._lock:
            free = max(0, self._limit - self._used)
            if n_bytes > free and not forced:
                raise DiskFull(
                    f"Corpora may take {self._limit} bytes on this node and {free} are left; delete corpora, or raise"
                    " the limit.",
                    metadata={"required_bytes": str(n_bytes), "free_bytes": str(free)},
                )
            self._used += n_bytes

    def give_back(self, n_bytes: int) -> None:
        """Counts bytes as removed."""
        with self._lock:
            self._used -= n_bytes


class Share:
    """The bytes that one ingest or upload has taken of the quota, given back together."""

    def __init__(self, quota: Quota, check: Callable[[], None]) -> None:
        self._quota = quota
        self._check = check
        self._taken = 0

    def take(self, n_bytes: int) -> None:
        """Takes bytes; raises DiskFull, or the error of `check`."""
        self._check()
        self._quota.take(n_bytes)
        self._taken += n_bytes

    def give_back(self) -> None:
        """Gives back all bytes taken so far."""
        self._quota.give_back(self._taken)
        self._taken = 0
