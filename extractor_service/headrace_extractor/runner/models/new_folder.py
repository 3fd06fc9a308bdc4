"""A folder of model files that is there complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from headrace_extractor.errors import DiskFull

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Held for as long as the attempt lives: the kernel gives it back also for one that is killed.
_LOCK = "lock"


@contextmanager
def new_folder(target_path: Path) -> Iterator[Path]:
    """Yields the path to write to; what is there at the end of the block gets its name, or is removed. Raises DiskFull.

    `target_path` must not exist at first. Nodes that share the disk may make it at the same time, each in a place of
    its own; the first to be done gives the name. What killed attempts left goes first; where the disk knows no locks,
    the registry's model store removes it some day.
    """
    partial = target_path.with_name(f".{target_path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with disk_full_as_typed(target_path), _claimed(partial, target_path):
            folder = partial / target_path.name
            yield folder
            _make_durable(folder)
            _give_name(folder, target_path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _claimed(partial: Path, target_path: Path) -> Iterator[None]:
    """Makes the place of this attempt, which others leave alone until the end of the block; clears away dead ones."""
    for other in target_path.parent.glob(f".{glob.escape(target_path.name)}.*.partial"):
        _remove_dead(other)
    partial.mkdir(parents=True)
    # It gets its name once it is locked: before, another attempt could take it for that of a dead one.
    unlocked = partial / f"un{_LOCK}ed"
    with unlocked.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(partial / _LOCK)
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                raise
        yield


def _remove_dead(partial: Path) -> None:
    # No lock, or one that is held or can't be asked for: it may live.
    with suppress(OSError), (partial / _LOCK).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _give_name(folder: Path, target_path: Path) -> None:
    """A folder that has its name is whole: where another node was faster, there is nothing left to do."""
    try:
        folder.rename(target_path)
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
