"""A folder of model files that is there complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from extractor_service.errors import DiskFull

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(target_path: Path) -> Iterator[Path]:
    """Yields the path to write to; what is there at the end of the block gets its name, or is removed. Raises DiskFull.

    `target_path` must not exist.
    """
    partial = target_path.with_name(f".{target_path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full_as_typed(target_path):
            yield partial
            _make_durable(partial)
            partial.rename(target_path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_full_as_typed(target_path: Path) -> Iterator[None]:
    """Turns a disk that is full, which safetensors puts into words of its own, into DiskFull."""
    try:
        yield
    except (OSError, SafetensorError) as exc:
        if getattr(exc, "errno", None) not in _NO_SPACE and "No space left" not in str(exc):
            raise
        free_bytes = shutil.disk_usage(target_path.parent).free
        raise DiskFull(
            f"The disk of {target_path} is full ({free_bytes} bytes free); free some space, then prepare the model.",
            metadata={"free_bytes": str(free_bytes)},
        ) from exc


def _make_durable(folder: Path) -> None:
    """Before the folder gets its name: a name stands for whole files, readable to whom its config is."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
