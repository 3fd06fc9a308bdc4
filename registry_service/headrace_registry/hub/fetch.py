"""Fetches one file: goes on where it stopped, checks it against the hub's digest, then gives it its name.

An unfinished file is `.NAME.part`. A file that has its name is complete, checked and on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import get_session, hf_raise_for_status

from headrace_registry.hub.faults import Cut, WrongDigest
from headrace_registry.hub.listing import RemoteFile
from headrace_registry.hub.patience import Patience

_CONNECT_S = 15.0
_READ_BYTES = 1024 * 1024
_FETCHES_OF_A_WRONG_FILE = 2


class Stopped(Exception):
    """Another file failed; this one need not go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """How to reach files: headers with the token, patience, and who counts bytes (fewer when some are thrown away)."""

    headers: dict[str, str]
    stall_s: float
    patience: Patience
    count: Callable[[int], None]
    stop: threading.Event


def fetch_file(file: RemoteFile, url: str, folder: Path, line: Line) -> None:
    """Makes the file complete in the folder. Raises WrongDigest, Stopped, and what the hub refuses with."""
    finished = folder / file.name
    partial = _Partial(folder, file, line.count)
    with closing(partial):
        if line.patience.call(lambda: _is_complete(finished, file.size) or partial.open()):
            line.count(finished.stat().st_size)
            return
        for _ in range(_FETCHES_OF_A_WRONG_FILE):
            line.patience.call(lambda: _pull(url, partial, line), moved=lambda: partial.n_bytes)
            if partial.is_right():
                partial.finish(finished)
                return
            partial.clear()
    raise WrongDigest(
        f"{file.name} came twice with a digest or size that is not the hub's; prepare again, or tell who keeps the repo"
    )


def _pull(url: str, partial: _Partial, line: Line) -> None:
    """One try; the bytes it brings stay. Raises Cut when they end early."""
    if partial.is_full():
        return
    start = partial.n_bytes
    # Compressed bodies have no length, and ranges of them mean something else.
    headers = {**line.headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    timeout = httpx2.Timeout(line.stall_s, connect=min(_CONNECT_S, line.stall_s))
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.clear()
            raise Cut(f"{partial.name} has no byte {start}")
        hf_raise_for_status(response)
        if start and not _goes_on(response, start):
            partial.clear()
        for block in response.iter_bytes():
            if line.stop.is_set():
                raise Stopped
            partial.write(block)
            if partial.is_too_long():
                return
    if partial.size is not None and not partial.is_full():
        raise Cut(f"{partial.name} ended after {partial.n_bytes} of {partial.size} bytes")


def _goes_on(response: httpx2.Response, start: int) -> bool:
    """True if the body begins where the bytes on disk end; some servers send the whole file again."""
    answered = str(response.headers.get("content-range", ""))
    return response.status_code == httpx2.codes.PARTIAL_CONTENT and answered.startswith(f"bytes {start}-")


class _Partial:
    """An unfinished file on the disk, and the digest of what it has."""

    def __init__(self, folder: Path, file: RemoteFile, count: Callable[[int], None]) -> None:
        self.name = file.name
        self.size = file.size
        self.n_bytes = 0
        self._file = file
        self._descriptor = -1
        self._path = folder / f".{file.name}.part"
        self._count = count
        self._digest: Any = self._fresh_digest()

    def open(self) -> bool:
        """Takes up what is there; returns False. Raises Cut while another process, about to end, still writes it."""
        # A link put there by somebody is not followed.
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(self._descriptor), self._path.lstat())
        except (BlockingIOError, FileNotFoundError):
            ours = False  # The other one gave it its name just now.
        if not ours:
            self.close()
            raise Cut(f"{self.name} is written by another process")
        while block := os.read(self._descriptor, _READ_BYTES):
            self._take(block)
        if self.is_too_long():
            self.clear()
        return False

    def close(self) -> None:
        """Lets go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def write(self, block: bytes) -> None:
        """Appends."""
        left = memoryview(block)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._take(block)

    def clear(self) -> None:
        """Forgets everything that came."""
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._count(-self.n_bytes)
        self.n_bytes = 0
        self._digest = self._fresh_digest()

    def is_full(self) -> bool:
        return self.size is not None and self.n_bytes >= self.size

    def is_too_long(self) -> bool:
        return self.size is not None and self.n_bytes > self.size

    def is_right(self) -> bool:
        """Compares with what the hub says; what it does not say can't be wrong."""
        if self.size is not None and self.n_bytes != self.size:
            return False
        wanted = self._file.sha256 or (self._file.git_sha1 if self.size is not None else "")
        return not wanted or self._digest.hexdigest() == wanted

    def finish(self, finished: Path) -> None:
        """Gives it its name, once the disk has it."""
        os.fsync(self._descriptor)
        self._path.replace(finished)

    def _take(self, block: bytes) -> None:
        self._digest.update(block)
        self.n_bytes += len(block)
        self._count(len(block))

    def _fresh_digest(self) -> Any:
        if self._file.sha256 or self._file.size is None:
            return hashlib.sha256()
        # Git names a blob by SHA-1 over a header and the bytes.
        return hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)


def _is_complete(path: Path, size: int | None) -> bool:
    with suppress(FileNotFoundError):
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and (size is None or found.st_size == size)
    return False
