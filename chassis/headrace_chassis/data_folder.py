"""The folder of a server's data, which others on the machine have no business in unless an operator lets them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from headrace_chassis.errors import FolderInvalid

logger = logging.getLogger(__name__)


def make_private(folder: Path) -> None:
    """Makes the folder, for its owner alone, if it does not exist; files made from now on get no more rights than it.

    A folder that exists keeps its mode: `chmod 750` lets a group read, for example trainers that read the rows' files.
    Raises FolderInvalid.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise FolderInvalid(f"--data-dir {folder} can't be made ({exc.strerror}); give another folder.") from exc
    mode = folder.stat().st_mode & 0o777
    os.umask(0o777 & ~(mode | 0o700))
    # Passing through is not reading: as root, the embedded Postgres runs as another user and has to.
    if mode & 0o066:
        logger.warning("others on this machine may read or write %s; `chmod 700` keeps it to its owner", folder)
