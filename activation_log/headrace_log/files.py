"""Small durable steps on files, and the errors of a full disk or too many open files."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace_log.errors import DiskFull, SetCorrupt, TooManyFiles

# EFBIG is the file size limit of the process: for the user the same as a full disk.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# File systems over a network or in user space answer so; their names can't be made more durable.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
# The limit of the process, and the machine's.
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)

# Of a disk that fails, of a file that is gone from its server, and of a folder in a file's place.
UNREADABLE = (errno.EIO, errno.ESTALE, errno.EISDIR)


@contextmanager
def disk_full_as_typed(path: Path, required_bytes: int) -> Iterator[None]:
    """Turns the errors of a full disk or a full quota into DiskFull."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NO_SPACE:
            raise
        stats = os.statvfs(path.parent)
        raise DiskFull(path, required_bytes=required_bytes, free_bytes=stats.f_bavail * stats.f_frsize) from exc


@contextmanager
def too_many_files_as_typed() -> Iterator[None]:
    """Turns the errors of a process without a free file descriptor into TooManyFiles."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NO_DESCRIPTOR:
            raise
        raise TooManyFiles(max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0]) from exc


@contextmanager
def unreadable_as_typed(path: Path) -> Iterator[None]:
    """Turns the errors of a file that can't be read into SetCorrupt."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in UNREADABLE:
            raise
        raise SetCorrupt(f"{path} can't be read: {exc.strerror}") from exc


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` survive a power cut, where the file system syncs folders."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`. Even after a crash a reader sees the old file or the new one. Raises DiskFull."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with disk_full_as_typed(path, len(content)):
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def append_durably(path: Path, line: bytes) -> None:
    """Appends `line` in one write and waits until it is on disk. Raises DiskFull."""
    with disk_full_as_typed(path, len(line)):
        is_new = not path.exists()
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(fd, line)
            if written != len(line):  # Only a full disk cuts a write to a file short.
                raise OSError(errno.ENOSPC, f"wrote {written} of {len(line)} bytes", str(path))
            os.fsync(fd)
        finally:
            os.close(fd)
        if is_new:
            fsync_folder(path.parent)
