"""The child that downloads, `python -m headrace_registry.hub.download`: job on standard input, events on output."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Self

from huggingface_hub import HfApi
from huggingface_hub.utils.tqdm import disable_progress_bars

from headrace_chassis.confined.limits import Limits, limit_memory
from headrace_models.folder import CONFIG
from headrace_models.unsupported import problem_of
from headrace_registry.hub.events import GO, ORPHANED, Event, Job, exit_when_orphaned
from headrace_registry.hub.faults import failure_of
from headrace_registry.hub.fetch import Line, fetch_file
from headrace_registry.hub.listing import Listing, RemoteFile, list_files, resolve
from headrace_registry.hub.objects import headers_of, read_object, url_of
from headrace_registry.hub.patience import Patience
from headrace_registry.models.cards import CARD_FILE

_REPORT_EVERY_S = 0.5
# One connection to a CDN seldom uses the whole bandwidth; more than a few only share it.
_FILES_AT_ONCE = 4
# The libraries take 100 MB, and the largest index of plain names 230 MB; other JSON can take 25 times its size.
_LIMITS = Limits(memory_bytes=768 * 1024 * 1024)
_OUTPUT = threading.Lock()


def main() -> int:
    """Runs the job; the exit status is 0 after a `done`, `resolved` or `failed` event."""
    limit_memory(_LIMITS)
    job = Job(**json.loads(sys.stdin.readline()))
    disable_progress_bars()
    try:
        run(job, say, wait_for_go)
    except Exception as exc:  # noqa: BLE001 - the parent must hear of every failure.
        say(failure_of(exc, job))
    sys.stdout.flush()
    os._exit(0)  # Threads of files that are not needed any more may still wait for their socket.


def run(job: Job, tell: Callable[[Event], None], may_go: Callable[[], None]) -> None:
    """Resolves the revision to a commit; unless the job asks for no more, waits for leave and downloads."""

    def tell_waiting(why: str, wait_s: float) -> None:
        message = f"the hub: {why}; trying again in {wait_s:.0f} s"
        tell(Event(kind="waiting", message=message, retry_after_s=wait_s))

    api = HfApi(token=job.token or None)
    patience = Patience(backoff_s=job.backoff_s, on_wait=tell_waiting)
    if job.resolve_only:
        commit_sha = resolve(api, job)
        tell(Event(kind="resolved", commit_sha=commit_sha))
        config = read_object(job, RemoteFile(name=CONFIG, size=None), commit_sha)
        tell(Event(kind="done", commit_sha=commit_sha, message=problem_of(config)))
        return
    listing = patience.call(lambda: list_files(api, job, partial(read_object, job)))
    target = Path(job.models_dir) / f"{job.name}-{listing.commit_sha[:12]}"
    facts = {
        "commit_sha": listing.commit_sha,
        "path": str(target),
        "total_bytes": listing.total_bytes,
        "pickled": listing.pickled,
    }
    tell(Event(kind="resolved", **facts))  # type: ignore[arg-type]
    may_go()
    fetch(job, listing, target, patience, tell)
    if listing.card:
        (target / CARD_FILE).write_text(json.dumps(dict(listing.card)))
    tell(Event(kind="done", done_bytes=listing.total_bytes, **facts))  # type: ignore[arg-type]


def fetch(job: Job, listing: Listing, target: Path, patience: Patience, tell: Callable[[Event], None]) -> None:
    """Fetches all files, a few at once. Raises the first file's error, and leaves the other files unfinished."""
    stop = threading.Event()
    with _Reporter(listing.total_bytes, tell) as reporter:
        line = Line(headers=headers_of(job), stall_s=job.stall_s, patience=patience, count=reporter.count, stop=stop)
        pool = ThreadPoolExecutor(_FILES_AT_ONCE)
        files = {
            pool.submit(fetch_file, file, url_of(job, file.name, listing.commit_sha), target, line)
            for file in listing.files
        }
        done, _ = wait(files, return_when=FIRST_EXCEPTION)
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for each in done:
            each.result()


def say(event: Event) -> None:
    """Writes one event."""
    with _OUTPUT:
        sys.stdout.write(event.line())
        sys.stdout.flush()


def wait_for_go() -> None:
    """Waits for the parent's leave. From then on this process ends when its parent does."""
    if sys.stdin.readline().encode() != GO:
        os._exit(ORPHANED)
    exit_when_orphaned()


class _Reporter:
    """Counts the bytes of several threads and reports their sum twice a second."""

    def __init__(self, total_bytes: int, tell: Callable[[Event], None]) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._tell = tell
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def count(self, n_bytes: int) -> None:
        with self._lock:
            self._done_bytes += n_bytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_REPORT_EVERY_S):
            self._tell(Event(kind="progress", done_bytes=self._done_bytes, total_bytes=self._total_bytes))


if __name__ == "__main__":
    sys.exit(main())
