"""A folder of model files that exists complete or not at all."""

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
# Locked for as long as the process of an attempt lives: the kernel unlocks it also when the process is killed.
_LOCK = "lock"


@contextmanager
def new_folder(target_path: Path) -> Iterator[Path]:
    """Yields a path to make a folder at; the folder becomes `target_path` at the end of the block. Raises DiskFull.

    `target_path` must not exist at first. Nodes that share the disk may make it at the same time, each in a place of
    its own; the first to finish gives the name. After an error the folder is removed. Folders of killed attempts are
    removed first; on a disk without locks the registry's model store removes them later.
    """
    partial = target_path.with_name(f".{target_path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with disk_full_as_typed(target_path), _claimed(partial, target_path):
            folder = partial / target_path.name
            yield folder
            # A folder with its name is whole on disk, and all of it as readable as config.json: safetensors makes files
            # that only their owner can read, and nodes that share a disk may run as different users.
            mode = (folder / "config.json").stat().st_mode & 0o777
            for path in folder.iterdir():
                if path.is_symlink():  # The file of another folder.
                    continue
                path.chmod(mode)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            try:
                folder.rename(target_path)
            except OSError as exc:
                if exc.errno not in _TAKEN:  # Taken: another node was faster, and its folder is whole too.
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _claimed(partial: Path, target_path: Path) -> Iterator[None]:
    """Makes the place of this attempt and locks it during the block; removes places of attempts that were killed."""
    for other in target_path.parent.glob(f".{glob.escape(target_path.name)}.*.partial"):
        # Without a lock file, or with one that is locked or can't be locked, the attempt may still live.
        with suppress(OSError), (other / _LOCK).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
    partial.mkdir(parents=True)
    # The lock file gets its name once it is locked: an unlocked one would mark this attempt as dead.
    unlocked = partial / f"un{_LOCK}ed"
    with unlocked.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(partial / _LOCK)
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                raise
        yield


@contextmanager
def disk_full_as_typed(target_path: Path) -> Iterator[None]:
    """Turns the error of a full disk into DiskFull; safetensors reports it in words only."""
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
