"""The child process, `python -m registry_service.hub.download`: a job on standard input, events on standard output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from registry_service.hub.events import ALLOWED_PATTERNS, Event, Job

_REPORT_EVERY_S = 0.5
_API_TIMEOUT_S = 30.0
_ORPHANED = 3


def main() -> int:
    """Runs the job; the exit status is 0 whenever `done` or `failed` was said."""
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_exit_when_orphaned, daemon=True).start()
    disable_progress_bars()
    try:
        fetch(job, say)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the parent must hear of it.
        say(failure_of(exc, job))
    return 0


def fetch(job: Job, tell: Callable[[Event], None]) -> None:
    """Resolves the revision to a commit, checks the disk, downloads."""
    api = HfApi(token=job.token or None)
    info = api.model_info(job.repo_id, revision=job.revision, files_metadata=True, timeout=_API_TIMEOUT_S)
    commit_sha = info.sha or ""
    siblings = [each for each in info.siblings or () if any(fnmatch(each.rfilename, p) for p in ALLOWED_PATTERNS)]
    total_bytes = sum(each.size or 0 for each in siblings)
    target = Path(job.models_dir) / f"{job.name}-{commit_sha[:12]}"
    tell(Event(kind="resolved", commit_sha=commit_sha, path=str(target), total_bytes=total_bytes))
    if not any(each.rfilename.endswith(".safetensors") for each in siblings):
        message = f"{job.repo_id} has no safetensors weights; convert it with save_pretrained() and register the folder"
        tell(Event(kind="failed", reason="MODEL_UNSUPPORTED", message=message))
        return
    target.mkdir(parents=True, exist_ok=True)
    missing_bytes = total_bytes - folder_bytes(target)
    free_bytes = shutil.disk_usage(target).free
    if missing_bytes > free_bytes:
        message = f"{job.repo_id} needs {missing_bytes} more bytes, {target} has {free_bytes} free; make room"
        tell(Event(kind="failed", reason="DISK_FULL", message=message))
        return
    with _Reporter(target, commit_sha, total_bytes, tell):
        snapshot_download(
            job.repo_id,
            revision=commit_sha,
            local_dir=target,
            allow_patterns=list(ALLOWED_PATTERNS),
            token=job.token or None,
        )
    tell(Event(kind="done", commit_sha=commit_sha, path=str(target), done_bytes=total_bytes, total_bytes=total_bytes))


def folder_bytes(folder: Path) -> int:
    """Bytes of everything below, the unfinished included."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:
                continue  # Renamed in between: counted the next time.
    return total


def failure_of(exc: Exception, job: Job) -> Event:
    """Maps what huggingface_hub raises to a reason and a remedy."""
    where = f"{job.repo_id}@{job.revision}"
    reason, message = "HUB_UNAVAILABLE", f"the hub can't be reached for {where} ({type(exc).__name__}); try again"
    if isinstance(exc, GatedRepoError):
        reason, message = "HUB_GATED", f"{where} is gated; ask for access on its page and pass a token"
    elif isinstance(exc, RepositoryNotFoundError) and not job.token and _status(exc) == 401:
        reason, message = "HUB_GATED", f"{where} does not exist or is private; check the name, or pass a token"
    elif isinstance(
        exc, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError)
    ) and not (isinstance(exc, LocalEntryNotFoundError)):
        reason, message = "HUB_NOT_FOUND", f"the hub has no {where}; check repo and revision"
    elif isinstance(exc, OfflineModeIsEnabled):
        message = "this registry runs with HF_HUB_OFFLINE; unset it, or register a local folder"
    elif isinstance(exc, HfHubHTTPError) and _status(exc) in (401, 403):
        reason, message = "HUB_GATED", f"the hub refuses {where}; check the token and its rights"
    elif isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        reason, message = "DISK_FULL", f"the disk filled up while fetching {where}; make room and prepare again"
    return Event(kind="failed", reason=reason, message=message)


def say(event: Event) -> None:
    """Writes one event."""
    sys.stdout.write(event.line())
    sys.stdout.flush()


def _status(exc: Exception) -> int:
    return int(getattr(getattr(exc, "response", None), "status_code", 0) or 0)


def _exit_when_orphaned() -> None:
    sys.stdin.read()
    os._exit(_ORPHANED)


class _Reporter:
    """Tells the size of the folder twice a second: it sees what is on disk, whichever way it came."""

    def __init__(self, target: Path, commit_sha: str, total_bytes: int, tell: Callable[[Event], None]) -> None:
        self._target = target
        self._commit_sha = commit_sha
        self._total_bytes = total_bytes
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_REPORT_EVERY_S):
            done_bytes = min(folder_bytes(self._target), self._total_bytes)
            event = Event(
                kind="progress",
                commit_sha=self._commit_sha,
                path=str(self._target),
                done_bytes=done_bytes,
                total_bytes=self._total_bytes,
            )
            self._tell(event)


if __name__ == "__main__":
    sys.exit(main())
