"""A folder of model files that is there complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from extractor_service.errors import DiskFull

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


@contextmanager
def new_folder(target_path: Path) -> Iterator[Path]:
    """Yields the path to write to; what is there at the end of the block gets its name, or is removed. Raises DiskFull.

    `target_path` must not exist at first. Nodes that share the disk may make it at the same time, each in a place of
    its own; the first to be done gives the name. What a kill leaves behind, the registry's model store removes.
    """
    partial = target_path.with_name(f".{target_path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with disk_full_as_typed(target_path):
            yield partial
            _make_durable(partial)
            _give_name(partial, target_path)
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


def _give_name(partial: Path, target_path: Path) -> None:
    """A folder that has its name is whole: where another node was faster, there is nothing left to do."""
    try:
        partial.rename(target_path)
    except OSError as exc:
        if exc.errno not in _TAKEN:
            raise


def _make_durable(folder: Path) -> None:
    """Before the folder gets its name: a name stands for whole files, readable to whom its config is."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
