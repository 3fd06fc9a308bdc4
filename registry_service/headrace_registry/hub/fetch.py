"""Fetches one file: continues where an earlier try stopped, checks the hub's digest, then gives the file its name.

An unfinished file is named `.NAME.part`. A file under its own name is complete, checked and on the disk.
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
    """Another file failed, so this one stops too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """How to reach files: headers with the token, retries, and a counter of bytes (negative for discarded ones)."""

    headers: dict[str, str]
    stall_s: float
    patience: Patience
    count: Callable[[int], None]
    stop: threading.Event


def fetch_file(file: RemoteFile, url: str, folder: Path, line: Line) -> None:
    """Completes the file in the folder. Raises WrongDigest, Stopped, and the hub's errors."""
    finished = folder / file.name
    partial = _Partial(folder, file, line.count)

    def found_complete() -> bool:
        with suppress(FileNotFoundError):
            found = finished.lstat()
            if stat.S_ISREG(found.st_mode) and file.size in (None, found.st_size):
                return True
        partial.open()
        return False

    with closing(partial):
        # With retries: another process may be writing the file, and name it in a moment.
        if line.patience.call(found_complete):
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
    """Fetches the missing bytes in one try; bytes that arrive are kept. Raises Cut when the body ends early."""
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
        # Some servers ignore the range and send the whole file again.
        answered = str(response.headers.get("content-range", ""))
        partly = response.status_code == httpx2.codes.PARTIAL_CONTENT
        if start and not (partly and answered.startswith(f"bytes {start}-")):
            partial.clear()
        for block in response.iter_bytes():
            if line.stop.is_set():
                raise Stopped
            partial.write(block)
            if partial.is_too_long():
                return
    if partial.size is not None and not partial.is_full():
        raise Cut(f"{partial.name} ended after {partial.n_bytes} of {partial.size} bytes")


class _Partial:
    """An unfinished file on the disk, and the digest of its bytes."""

    def __init__(self, folder: Path, file: RemoteFile, count: Callable[[int], None]) -> None:
        self.name = file.name
        self.size = file.size
        self.n_bytes = 0
        self._file = file
        self._descriptor = -1
        self._path = folder / f".{file.name}.part"
        self._count = count
        self._digest: Any = self._fresh_digest()

    def open(self) -> None:
        """Opens the file and digests the bytes of earlier tries. Raises Cut while another process writes the file."""
        # O_NOFOLLOW: a link planted under this name must not lead out of the folder.
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(self._descriptor), self._path.lstat())
        except (BlockingIOError, FileNotFoundError):
            ours = False  # The other process writes it, or has just given it its name.
        if not ours:
            self.close()
            raise Cut(f"{self.name} is written by another process")
        while block := os.read(self._descriptor, _READ_BYTES):
            self._take(block)
        if self.is_too_long():
            self.clear()

    def close(self) -> None:
        """Closes the file, and so releases its lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def write(self, block: bytes) -> None:
        """Appends a block."""
        left = memoryview(block)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._take(block)

    def clear(self) -> None:
        """Discards all bytes."""
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
        """Compares size and digest with the hub's, as far as the hub names them."""
        if self.size is not None and self.n_bytes != self.size:
            return False
        wanted = self._file.sha256 or (self._file.git_sha1 if self.size is not None else "")
        return not wanted or self._digest.hexdigest() == wanted

    def finish(self, finished: Path) -> None:
        """Gives the file its name, once its bytes are on the disk."""
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
