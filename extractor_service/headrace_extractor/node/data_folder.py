"""The data folder of an extractor: one process at a time uses it, and it tells two nodes of one id apart."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

from headrace_chassis.errors import FolderInvalid
from headrace_log.errors import LockHeld, NoLocks
from headrace_log.locks import FileLock

LOCK_NAME = "extractor.lock"
# A server that was killed by its supervisor may be restarted while the system still takes its memory apart.
_WAIT_S = 2.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def lock_data_folder(folder: Path) -> FileLock:
    """Keeps other extractors off the folder until the lock is closed. Raises FolderInvalid."""
    try:
        return FileLock(folder / LOCK_NAME, wait_s=_WAIT_S)
    except LockHeld as exc:
        raise FolderInvalid(
            f"Another extractor, process {exc.holder or 'unknown'}, uses --data-dir {folder}; end it, or give this one "
            "another --data-dir."
        ) from exc
    except NoLocks as exc:
        raise FolderInvalid(
            f"--data-dir {folder} is on a file system without locks; give a folder on a local disk, or mount that file "
            "system with locks."
        ) from exc
    except OSError as exc:
        raise FolderInvalid(f"--data-dir {folder} can't be written ({exc.strerror}).") from exc


def boot_nonce(folder: Path) -> str:
    """Returns a random word for this start, behind a word that stays the same for this folder until a reboot.

    By the first word the registry knows a restart from a second extractor with the same node id.
    """
    try:
        machine = _BOOT_ID.read_text("ascii")
    except OSError:  # Not Linux.
        machine = str(uuid.getnode())
    stat = folder.stat()
    place = hashlib.sha256(f"{machine} {stat.st_dev} {stat.st_ino}".encode()).hexdigest()[:16]
    return f"{place}.{uuid.uuid4().hex}"
