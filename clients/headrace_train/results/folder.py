"""The folder of a training's results: an earlier result stays until a whole new one takes its place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace_client.errors import AlreadyExists, HeadraceError
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

    Raises AlreadyExists if another process trains into `out`. A block that raises leaves `out` as it was. If the new
    files can't take their place, `out` is as it was too, and they stay in `.unfinished/new`.
    """
    check_free(out, overwrite=overwrite)
    draft = out / _DRAFT
    new, old = draft / "new", draft / "old"
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
        _undo(new, out, old)  # Of a run that was killed while it moved files.
        shutil.rmtree(old, ignore_errors=True)
        check_free(out, overwrite=overwrite)  # Another training may have ended since.
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        try:
            _put(new, out, old)
        except OSError as exc:
            raise HeadraceError(
                f"the new result can't take its place in {out}: {exc}",
                reason="FILE_ERROR",
                remedy=f"move it away before the next training: it is complete, in {new}",
            ) from exc
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if not new.exists() and not old.exists():  # Results that could not be moved stay.
            shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            lock.close()


def _put(new: Path, out: Path, old: Path) -> None:
    """Moves the files of `new` to `out`, those of `out` to `old`; all or none of them.

    The metadata come last: they say that all others are there.
    """
    old.mkdir(exist_ok=True)
    try:
        # All of an earlier result goes: a table of it would be of another SAE.
        for name in RESULTS:
            _move(name, out, old)
        for name in reversed(RESULTS):
            _move(name, new, out)
    except BaseException:
        _undo(new, out, old)
        raise


def _undo(new: Path, out: Path, old: Path) -> None:
    """Takes back what `_put` has moved, unless it was over: then no metadata are left in `new`."""
    if not (new / METADATA_FILE).exists():
        return
    if not (new / SAE_FOLDER).exists():  # The SAE goes first, so the results in `out` are new ones.
        for name in RESULTS:
            _move(name, out, new)
    for name in reversed(RESULTS):
        _move(name, old, out)


def _move(name: str, here: Path, there: Path) -> None:
    with suppress(FileNotFoundError):  # A training that was cut short has no tables.
        (here / name).rename(there / name)
