"""Memory of a GPU as its driver counts it, of all processes together."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_PERIOD_S = 0.2


@dataclass(slots=True)
class Peak:
    """The most bytes in use at any sample."""

    used_bytes: int = 0


def describe() -> dict[str, str]:
    """Returns name and driver of the first GPU; empty without a GPU."""
    found = _ask("name,driver_version")
    return dict(zip(("gpu", "driver"), found, strict=True)) if found else {}


def used_bytes() -> int:
    """Returns the bytes in use on the first GPU; 0 without a GPU."""
    found = _ask("memory.used")
    return int(found[0]) * 1024 * 1024 if found else 0


@contextmanager
def watched() -> Iterator[Peak]:
    """Samples five times a second while the block runs."""
    peak, over = Peak(used_bytes()), threading.Event()

    def look() -> None:
        while not over.wait(_PERIOD_S):
            peak.used_bytes = max(peak.used_bytes, used_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _ask(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (FileNotFoundError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in done.stdout.splitlines()[0].split(",")]
