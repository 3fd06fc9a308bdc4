"""The model store on the disk: one folder per model and commit, right below one root.

Nothing here follows a link or leaves the root. A folder is renamed in one step before its files are removed, so that no
folder under its own name is half removed. Every function blocks; callers run them in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeAlias

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}-[0-9a-f]{12}(-[a-z0-9]{1,16})?")
# A folder that a node is making; each attempt has a name of its own.
_PARTIAL = re.compile(rf"\.(?P<name>{_NAME.pattern})(\.[0-9a-f]{{8}})?\.partial")
# With the path that it gets once it is complete.
Partial: TypeAlias = tuple[Path, Path]
_TRASH = re.compile(r"\..+\.[0-9a-f]{8}\.trash")
# Bounds one scan of the root. The store makes one folder per model and commit; more entries are no work of its own.
_MAX_ENTRIES = 100_000


class ModelFolders:
    """The folders of the store, all directly below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))

    def owns(self, path: str) -> bool:
        """True for a path that the store may make, fill and remove as a folder."""
        candidate = Path(path)
        return str(candidate) == path and candidate.parent == self.root and bool(_NAME.fullmatch(candidate.name))

    def make(self, path: str) -> None:
        """Makes the folder if it does not exist. Raises OSError, also for a link or a file of that name."""
        assert self.owns(path), path
        self.root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)  # noqa: PTH102 - Path.mkdir(exist_ok=True) accepts a link to a folder.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(20, "is a link or a file", path)

    def sizes(self) -> dict[str, int]:
        """Bytes below every entry of the root, also of entries that the store did not make."""
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

    def discard(self, *paths: str, partials: Sequence[Partial] | None = None) -> None:
        """Takes folders and their partial copies out of use, a rename each; `empty_trash` then frees the bytes.

        `partials` may be listed before; a copy made since then goes when its folder is discarded again.
        """
        owned = {path for path in paths if self.owns(path)}
        listed = self.partials() if partials is None else partials
        attempts = [partial for partial, made in listed if str(made) in owned]
        self._throw_away([*map(Path, sorted(owned)), *attempts])

    def discard_leftovers(self, wanted: Collection[str], *, untouched_s: float) -> None:
        """Takes the partial copies of all folders but the `wanted` ones out of use, if their attempts are over.

        No message tells of a killed attempt, so an attempt without a write for `untouched_s` counts as over.
        """
        before = time.time() - untouched_s
        abandoned = []
        for partial, made in self.partials():
            if str(made) in wanted:
                continue
            with contextlib.suppress(OSError):  # Renamed or removed in between.
                if max(path.lstat().st_mtime for path in (partial, *partial.rglob("*"))) < before:
                    abandoned.append(partial)
        self._throw_away(abandoned)

    def empty_trash(self) -> int:
        """Removes discarded folders, also those of a killed process; returns the number of entries removed."""
        n_removed = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if not _TRASH.fullmatch(entry.name):
                    continue
                path = Path(entry.path)
                if path.is_symlink() or not path.is_dir():
                    path.unlink(missing_ok=True)
                else:  # Does not follow links; files that can't be removed stay trash.
                    shutil.rmtree(path, ignore_errors=True)
                n_removed += 1
        return n_removed

    def partials(self) -> list[Partial]:
        """Partial folders, each with the path it gets once it is complete."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            found = [(entry.path, match["name"]) for entry in entries if (match := _PARTIAL.fullmatch(entry.name))]
            return [(Path(path), self.root / name) for path, name in found]
        return []

    def _throw_away(self, paths: list[Path]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.rename(self.root / f".{path.name.strip('.')}.{uuid.uuid4().hex[:8]}.trash")


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; a link counts as 0."""
    try:
        found = path.lstat()
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        if not stat.S_ISDIR(found.st_mode):
            return 0
        return sum(tree_bytes(child) for child in path.iterdir())
    except OSError:
        return 0  # Renamed or removed in between.
