"""The model store on the disk: one folder per model and commit, right below one root.

Nothing here follows a link or leaves the root. What is removed gets another name first, in one step: a folder that has
its name is whole. Everything blocks; callers run it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Collection
from pathlib import Path

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}-[0-9a-f]{12}(-[a-z0-9]{1,16})?")
# Where a node makes a folder; each attempt has a place of its own.
_PARTIAL = re.compile(rf"\.(?P<name>{_NAME.pattern})(\.[0-9a-f]{{8}})?\.partial")
_TRASH = re.compile(r"\..+\.[0-9a-f]{8}\.trash")
_MAX_ENTRIES = 100_000


class ModelFolders:
    """The folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))

    def owns(self, path: str) -> bool:
        """True for the path of a folder that may be made, filled and removed here."""
        candidate = Path(path)
        return str(candidate) == path and candidate.parent == self.root and bool(_NAME.fullmatch(candidate.name))

    def make(self, path: str) -> None:
        """Makes the folder unless it is there. Raises OSError, also for a link or a file of that name."""
        assert self.owns(path), path
        self.root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)  # noqa: PTH102 - Path.mkdir(exist_ok=True) accepts a link to a folder.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(20, "is a link or a file", path)

    def sizes(self) -> dict[str, int]:
        """Bytes below every entry of the root, whoever made it."""
        sizes = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                sizes[entry.path] = tree_bytes(Path(entry.path))
                if len(sizes) >= _MAX_ENTRIES:
                    break
        return sizes

    def free_bytes(self) -> int:
        """Bytes the disk has left."""
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    def discard(self, path: str) -> None:
        """Takes the folder, and what nodes left of making it, out of use; `empty_trash` then gives the bytes back."""
        if self.owns(path):
            attempts = [partial for partial, made in self._partials() if str(made) == path]
            self._throw_away([Path(path), *attempts])

    def discard_leftovers(self, wanted: Collection[str], *, untouched_s: float) -> None:
        """As `discard`, what attempts that ended left of folders other than those that are `wanted`.

        Nobody says that an attempt was killed: it is one in which nothing was written for `untouched_s`.
        """
        before = time.time() - untouched_s
        partials = [partial for partial, made in self._partials() if str(made) not in wanted]
        self._throw_away([partial for partial in partials if _last_written(partial) < before])

    def empty_trash(self) -> int:
        """Removes what was discarded, also by a process that was killed meanwhile; returns how many entries."""
        n_removed = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if _TRASH.fullmatch(entry.name):
                    _remove(Path(entry.path))
                    n_removed += 1
        return n_removed

    def _partials(self) -> list[tuple[Path, Path]]:
        """What nodes make or left, each with the folder it is to become."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            found = [(entry.path, match["name"]) for entry in entries if (match := _PARTIAL.fullmatch(entry.name))]
            return [(Path(path), self.root / name) for path, name in found]
        return []

    def _throw_away(self, paths: list[Path]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.rename(self.root / f".{path.name.strip('.')}.{uuid.uuid4().hex[:8]}.trash")


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as nothing."""
    try:
        found = path.lstat()
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        if not stat.S_ISDIR(found.st_mode):
            return 0
        return sum(tree_bytes(child) for child in path.iterdir())
    except OSError:
        return 0  # Renamed or removed in between.


def _last_written(folder: Path) -> float:
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()  # Renamed or removed in between.


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)  # Does not follow links; what stays is trash still.
