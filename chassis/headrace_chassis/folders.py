"""Folders that a server was given by flags: they must be usable before it serves."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from headrace_chassis.errors import FolderInvalid


def usable_folder(path: Path, *, flag: str) -> Path:
    """Makes a folder that the server writes to, if it is missing, and returns its real path. Raises FolderInvalid."""
    real = Path(os.path.realpath(path))
    try:
        real.mkdir(parents=True, exist_ok=True)
        os.listdir(real)  # noqa: PTH208 -- the right to list it is asked, not its entries
        probe = real / f".probe-{uuid.uuid4().hex}"
        probe.mkdir()  # A full disk has space for this.
        probe.rmdir()
    except OSError as exc:
        raise FolderInvalid(f"{flag} {path} can't be used ({exc.strerror}); give a folder to read and write.") from exc
    return real


def readable_folder(path: Path, *, flag: str) -> Path:
    """Returns the real path of a folder that the server reads. Raises FolderInvalid."""
    real = Path(os.path.realpath(path))
    try:
        os.listdir(real)  # noqa: PTH208 -- as above
    except OSError as exc:
        raise FolderInvalid(f"{flag} {path} can't be read ({exc.strerror}); give a folder to read.") from exc
    return real
