"""The folder of a training's results: an earlier result stays until a whole new one takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace_client.errors import AlreadyExists
from headrace_log.errors import LockHeld, NoLocks
from headrace_log.locks import FileLock

SAE_FOLDER = "sae"
METADATA_FILE = "metadata.json"
FEATURES_FILE = "features.parquet"
TOP_ROWS_FILE = "top_rows.parquet"
# In the order in which an old result is moved away: without its metadata it counts as incomplete.
RESULTS = (METADATA_FILE, FEATURES_FILE, TOP_ROWS_FILE, SAE_FOLDER)
# Results lie here until they are complete.
_DRAFT = ".unfinished"


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raises AlreadyExists if `out` holds a result that was not asked to be replaced."""
    found = [name for name in (METADATA_FILE, SAE_FOLDER) if (out / name).exists()]
    if found and not overwrite:
        raise AlreadyExists(
            f"{out} holds the result of an earlier training ({', '.join(found)})",
            reason="FILE_EXISTS",
            remedy="choose another --out, or replace that result with --overwrite",
        )


@contextmanager
def new_result(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a folder for new files, which take the place of those in `out` at the end of the block.

    Raises AlreadyExists if another process trains into `out`. A block that raises leaves `out` as it was.
    """
    check_free(out, overwrite=overwrite)
    draft = out / _DRAFT
    draft.mkdir(parents=True, exist_ok=True)
    lock: FileLock | None = None
    try:
        with suppress(NoLocks):  # As on many clusters' disks: then people have to take care of it.
            lock = FileLock(draft / "lock")
    except LockHeld as exc:
        raise AlreadyExists(
            f"process {exc.holder} already trains into {out}",
            reason="ALREADY_RUNNING",
            remedy="let it end, stop it, or choose another --out",
        ) from exc
    try:
        new = draft / "new"
        shutil.rmtree(new, ignore_errors=True)  # Of a run that was killed.
        new.mkdir()
        yield new
        _put(new, out, draft / "old")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            lock.close()


def _put(new: Path, out: Path, old: Path) -> None:
    """Moves the files of `new` to `out`, the metadata last: they say that all others are there."""
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    # All of an earlier result goes: a table of it would be of another SAE.
    for name in RESULTS:
        with suppress(FileNotFoundError):
            (out / name).rename(old / name)
    for name in reversed(RESULTS):
        with suppress(FileNotFoundError):  # A training that was cut short has no tables.
            (new / name).rename(out / name)
