"""Paths that the registry may read: real paths under the model roots, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from headrace_registry.errors import FieldInvalid, ModelUnsupported, PathNotAllowed


class ModelRoots:
    """The allowed folders, resolved once."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    @property
    def paths(self) -> list[str]:
        """The folders, as a child process takes them."""
        return [str(root) for root in self._roots]

    def folder(self, path: str, *, field: str) -> str:
        """Returns the real path of an allowed folder."""
        real = self._real(path, field=field)
        if not os.path.isdir(real):  # noqa: PTH112 - `Path.is_dir` raises below a folder that may not be entered.
            problem = "is no folder, or the registry may not enter the folders above it"
            raise FieldInvalid(field, f"{path!r} {problem}; give the folder that holds config.json")
        return str(real)

    def file(self, path: str, *, field: str) -> str:
        """Returns the real path of an allowed file."""
        real = self._real(path, field=field)
        if not os.path.isfile(real):  # noqa: PTH113 - as above.
            raise FieldInvalid(field, f"{path!r} is no file, or the registry may not enter the folders above it")
        return str(real)

    def check_inside(self, path: Path) -> None:
        """Raises ModelUnsupported for a file in a folder that is a link to a place outside the roots."""
        if not self._allowed(Path(os.path.realpath(path))):
            raise ModelUnsupported(
                f"{path.name} is a link to a place outside the model roots; copy it or allow that with --models-root",
                metadata={"path": str(path)},
            )

    def _real(self, path: str, *, field: str) -> Path:
        if not path or "\x00" in path or len(path) > 4096:
            raise FieldInvalid(field, "give an absolute path")
        if not Path(path).is_absolute():
            raise FieldInvalid(field, f"{path!r} is not absolute")
        if ".." in Path(path).parts:
            raise FieldInvalid(field, f"{path!r} contains '..'; give the path without it")
        real = Path(os.path.realpath(path))
        if not self._allowed(real):
            problem = f"is outside the registry's folders; start it with --models-root {Path(path).parent}"
            if any(self._allowed(Path(os.path.realpath(parent))) for parent in Path(path).parents):
                problem = "leads by a link out of the registry's folders; copy the files there, or start the registry "
                problem += "with --models-root for the folder that the link leads to"
            raise PathNotAllowed(
                f"{path!r} {problem}",
                metadata={"path": path},
                field=field,
            )
        return real

    def _allowed(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)
