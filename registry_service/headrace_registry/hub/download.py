"""The child process, `python -m headrace_registry.hub.download`: a job on standard input, events on standard output."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.utils.tqdm import disable_progress_bars

from headrace_registry.hub.events import GO, Event, Job
from headrace_registry.hub.faults import failure_of
from headrace_registry.hub.fetch import Line, fetch_file
from headrace_registry.hub.listing import Listing, list_files, resolve
from headrace_registry.hub.patience import Patience

_REPORT_EVERY_S = 0.5
# One connection to a CDN seldom fills a line; more than a few only take turns.
_FILES_AT_ONCE = 4
_ORPHANED = 3


def main() -> int:
    """Runs the job; the exit status is 0 whenever `done`, `resolved` or `failed` was said."""
    job = Job(**json.loads(sys.stdin.readline()))
    disable_progress_bars()
    try:
        run(job, say, wait_for_go)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the parent must hear of it.
        say(failure_of(exc, job))
    sys.stdout.flush()
    os._exit(0)  # Threads of files that need not go on may still wait for their socket.


def run(job: Job, tell: Callable[[Event], None], may_go: Callable[[], None]) -> None:
    """Resolves the revision to a commit; unless that was all, waits for leave and downloads."""
    api = HfApi(token=job.token or None)
    patience = Patience(backoff_s=job.backoff_s, on_wait=lambda why, wait_s: tell(_waiting(why, wait_s)))
    if job.resolve_only:
        tell(Event(kind="resolved", commit_sha=resolve(api, job)))
        return
    listing = patience.call(lambda: list_files(api, job))
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
    tell(Event(kind="done", done_bytes=listing.total_bytes, **facts))  # type: ignore[arg-type]


def fetch(job: Job, listing: Listing, target: Path, patience: Patience, tell: Callable[[Event], None]) -> None:
    """Fetches all files, a few at once; the first that can't be had ends it."""
    token = job.token or get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    stop = threading.Event()
    with _Reporter(listing.total_bytes, tell) as reporter:
        line = Line(headers=headers, stall_s=job.stall_s, patience=patience, count=reporter.count, stop=stop)
        pool = ThreadPoolExecutor(_FILES_AT_ONCE)
        files = {
            pool.submit(
                fetch_file,
                file,
                hf_hub_url(job.repo_id, file.name, revision=listing.commit_sha, endpoint=_endpoint()),
                target,
                line,
            )
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
    """Waits for the parent's leave; from then on its end is this process's end."""
    if sys.stdin.readline().encode() != GO:
        os._exit(_ORPHANED)
    threading.Thread(target=_exit_when_orphaned, daemon=True).start()


_OUTPUT = threading.Lock()


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _waiting(why: str, wait_s: float) -> Event:
    return Event(kind="waiting", message=f"the hub: {why}; trying again in {wait_s:.0f} s", retry_after_s=wait_s)


def _exit_when_orphaned() -> None:
    sys.stdin.read()
    os._exit(_ORPHANED)


class _Reporter:
    """Counts bytes from several threads and tells the sum twice a second."""

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
