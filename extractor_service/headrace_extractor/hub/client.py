"""The server's side: starts the process that reads a dataset, takes documents from it, and ends the process."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from headrace_chassis.confined.environment import hub_environment
from headrace_extractor.errors import ExtraMissing, HubUnavailable, error_for
from headrace_extractor.hub.job import DOCUMENT, DONE, FAILED, RESOLVED, WAITING, FrameReader, HubJob

logger = logging.getLogger(__name__)

# The libraries try again by themselves for a hundred seconds; a process that is silent for longer hangs.
SILENCE_S = 300.0
_TICK_S = 0.25
_READ_BYTES = 1024 * 1024
_LOG_TAIL_BYTES = 2000
_END_S = 5.0
_RETRY_AFTER_S = 30.0


class HubDatasets:
    """Opens datasets in processes that get the part of `environment` that concerns the hub. All methods block."""

    def __init__(self, environment: Mapping[str, str], *, silence_s: float = SILENCE_S) -> None:
        self._environment = {
            **hub_environment(environment),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._silence_s = silence_s

    @contextmanager
    def open(self, job: HubJob, check: Callable[[], None]) -> Iterator[HubDataset]:
        """Yields a dataset after its commit is known. `check` is called often and ends a wait by raising.

        Raises ExtraMissing, HubNotFound, HubGated, HubUnavailable, FieldInvalid.
        """
        if importlib.util.find_spec("datasets") is None:
            raise ExtraMissing(
                "Datasets of the hub need the package `datasets`; install headrace[datasets] where the extractor runs.",
                metadata={"extra": "datasets"},
            )
        python_path = os.pathsep.join(path for path in sys.path if path)
        # In an empty working directory: `datasets` would take a folder with the dataset's name there for the dataset.
        with tempfile.TemporaryDirectory(prefix="headrace-hub-") as folder:
            child = subprocess.Popen(
                [sys.executable, "-m", "headrace_extractor.hub"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**self._environment, "PYTHONPATH": python_path},
                cwd=folder,
                start_new_session=True,
            )
            try:
                dataset = HubDataset(child, job, check, self._silence_s)
                dataset.resolve()
                yield dataset
            finally:
                child.kill()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_END_S)
                for stream in (child.stdin, child.stdout, child.stderr):
                    if stream is not None:
                        with suppress(OSError):
                            stream.close()


class HubDataset:
    """A dataset that a child process is reading."""

    def __init__(
        self, child: subprocess.Popen[bytes], job: HubJob, check: Callable[[], None], silence_s: float
    ) -> None:
        self._child = child
        self._job = job
        self._check = check
        self._silence_s = silence_s
        self._tail = _Tail(child)
        self._frames = self._read_frames()
        self.commit_sha = ""

    @property
    def origin(self) -> str:
        """The origin of the documents, as `HubJob.origin` writes it."""
        return self._job.origin(self.commit_sha)

    def resolve(self) -> None:
        """Sends the job and waits for the commit that its revision stands for."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write(self._job.line())
            self._child.stdin.flush()
        for kind, content in self._frames:
            if kind == RESOLVED:
                self.commit_sha = json.loads(content)["commit_sha"]
                return

    def documents(self) -> Iterator[bytes]:
        """Yields documents in order, in the form that `DocumentWriter` stores."""
        for kind, content in self._frames:
            if kind == DOCUMENT:
                yield content
            elif kind == DONE:
                return

    def _read_frames(self) -> Iterator[tuple[bytes, bytes]]:
        """Yields kind and content of each frame; raises the error of a failed frame, and HubUnavailable at the end."""
        frames = FrameReader()
        while data := self._read():
            try:
                for kind, content in frames.feed(data):
                    if kind == FAILED:
                        event = json.loads(content)
                        error = error_for(
                            event["reason"],
                            event["message"],
                            metadata=event["metadata"],
                            retry_after_s=event["retry_after_s"],
                        )
                        error.field = event["field"]
                        raise error
                    if kind == WAITING:
                        logger.info("dataset %s: %s", self._job.repo_id, content.decode(errors="replace"))
                    yield kind, content
            except ValueError as exc:
                raise self._died(str(exc)) from exc
        raise self._died(self._tail.text(self._job.token) or "without a word")

    def _read(self) -> bytes:
        """Waits for output of the child; returns no bytes at its end. Raises HubUnavailable if none comes for long."""
        assert self._child.stdout is not None
        give_up = time.monotonic() + self._silence_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while not selector.select(_TICK_S):
                self._check()
                if time.monotonic() > give_up:
                    raise self._died(f"no word for {self._silence_s:.0f} s")
        self._check()
        return os.read(self._child.stdout.fileno(), _READ_BYTES)

    def _died(self, why: str) -> HubUnavailable:
        logger.warning("reading dataset %s broke off: %s", self._job.repo_id, why)
        return HubUnavailable(
            f"Reading dataset {self._job.repo_id} broke off; try again, and see the extractor's log if it comes back.",
            retry_after_s=_RETRY_AFTER_S,
        )


class _Tail:
    """Reads a process's standard error, so that the process does not block there, and keeps the end of it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, name="hub-stderr", daemon=True)
        self._thread.start()

    def text(self, token: str) -> str:
        """Waits for the end of the process; returns its last lines with the token blotted out."""
        self._thread.join(_END_S)
        text = bytes(self._kept).decode(errors="replace").strip()
        return (text.replace(token, "***") if token else text)[-500:]

    def _read(self) -> None:
        assert self._child.stderr is not None
        with suppress(OSError, ValueError):  # `open` may close the pipe meanwhile.
            while data := os.read(self._child.stderr.fileno(), 64 * 1024):
                self._kept += data
                del self._kept[:-_LOG_TAIL_BYTES]
