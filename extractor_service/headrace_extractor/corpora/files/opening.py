"""Opens files whose path was checked, so that no link put there since the check can lead to another place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headrace_extractor.errors import FieldInvalid

# Opens a folder as a place to start from, even without the right to list it; Linux only.
_AS_PLACE = getattr(os, "O_PATH", os.O_RDONLY)


@contextmanager
def open_beneath(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file by its real path: every folder on the way is opened from the one before, none by a link.

    Raises FieldInvalid if it is no regular file, or if a part of the path has become a link since it was resolved.
    """
    descriptor = os.open(path.anchor, _AS_PLACE | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *folders, name = path.parts[1:] or (".",)
        for folder in folders:
            inner = os.open(folder, _AS_PLACE | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        # Not blocking: opening a pipe could wait for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        inner = os.open(name, flags, dir_fd=descriptor)
    except OSError as exc:
        raise FieldInvalid(f"{path} can't be opened: {exc.strerror}.", field="path.path") from exc
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(inner).st_mode):
        os.close(inner)
        raise FieldInvalid(f"{path} is no regular file; name a single file.", field="path.path")
    with os.fdopen(inner, "rb") as file:
        yield file
