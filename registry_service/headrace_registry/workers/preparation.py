"""Prepares models: downloads their files or finds them on the disk, has nodes convert and quantize them, inspects them.

A worker claims a preparation and renews the claim. A preparation without a claim, as after a kill, is taken over by any
worker and starts again. That is cheap: downloads resume, and a complete conversion is only inspected.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from headrace_chassis.errors import ServiceError
from headrace_chassis.meters import Meter
from headrace_registry.errors import DatabaseUnavailable, ModelUnsupported
from headrace_registry.hub.events import Event, Job
from headrace_registry.inputs import clean_text
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.builds import (
    BuildKind,
    BuildState,
    ClaimLost,
    FilesDoomed,
    is_quantized,
    merged,
    quantized_folder,
    unpickled_folder,
)
from headrace_registry.models.files import Inspection, ReadProgress, Stopped, file_digest, inspect_folder
from headrace_registry.models.models import Failure, Model, SourceKind, Transfer
from headrace_registry.models.roots import ModelRoots
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.storekeeper import Storekeeper

log = logging.getLogger(__name__)

T = TypeVar("T")

# Preparations mostly wait for the network or for a node; readers of disks have a limit of their own.
_MAX_RUNNING = 16
# As long as the message of a node's failure may be.
_MAX_MESSAGE_CHARACTERS = 2000
_MAX_READERS = 2
_PROGRESS_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1
# After so long without a report, a node has forgotten its build, and the build is assigned again.
_BUILD_SILENT_S = 600.0
# Tokens of preparations that fail stay; a hundred are more than one registry prepares at a time.
_MAX_TOKENS = 100
# A GGUF file becomes float32: at least twice as many bytes.
_UNPACKED = 2


class Downloader(Protocol):
    """Brings a hub repo to disk."""

    def fetch(self, job: Job) -> AsyncGenerator[Event, None]:
        """Yields events up to `done`; raises the hub errors."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """A model's unquantized files in `folder`, or the files that a node has to convert into it."""

    folder: Path
    commit_sha: str = ""  # Empty for a registered folder: its inspection computes the digest.
    conversion: BuildKind | None = None  # None: `folder` is complete.
    pickled: Path | None = None  # Folder to convert from, and to remove once the model is READY.
    converted_bytes: int = 0  # Space to reserve for the conversion.


class Preparer:
    """The worker of one registry process. `run` it beside the server."""

    def __init__(
        self,
        *,
        store: PreparationStore,
        wakeups: Wakeups,
        roots: ModelRoots,
        storekeeper: Storekeeper,
        allowances: Allowances,
        downloader: Downloader,
        worker: str,
        reason_of: Callable[[ServiceError], str],
    ) -> None:
        self.worker = worker
        self._store = store
        self._wakeups = wakeups
        self._roots = roots
        self._storekeeper = storekeeper
        self._allowances = allowances
        self._downloader = downloader
        self._reason_of = reason_of
        self._clearing: set[asyncio.Task[None]] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._readers = asyncio.Semaphore(_MAX_READERS)
        # Hub tokens by model id, in memory alone: a secret is never stored. Neither a restart nor a takeover by another
        # registry keeps them; a private repo then fails as HUB_GATED, until a call offers the token again.
        self._tokens: dict[str, str] = {}

    def offer_token(self, model_id: str, token: str) -> None:
        """Keeps a hub token for the preparation about to start; an empty token forgets the earlier one.

        Tokens are dropped after their download, and the oldest of more than a hundred at any time.
        """
        self._tokens.pop(model_id, None)
        if token:
            self._tokens[model_id] = token
        while len(self._tokens) > _MAX_TOKENS:
            self._tokens.pop(next(iter(self._tokens)))

    async def run(self) -> None:
        """Runs until cancelled; then gives its claims back."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    seen = self._wakeups.generation
                    try:
                        await self._round(group)
                    except DatabaseUnavailable as exc:
                        log.warning("preparations pause: %s", exc.message)
                    except Exception:
                        log.exception("a round of preparations failed")
                    await self._wakeups.wait(seen)
        finally:
            await asyncio.gather(*self._clearing, return_exceptions=True)
            try:
                await self._store.release(self.worker)
            except DatabaseUnavailable:
                log.warning("claims could not be given back; they run out by themselves")

    async def _round(self, group: asyncio.TaskGroup) -> None:
        """Renews claims, cancels preparations that lost theirs, and starts as many as there is capacity for."""
        if self._running:
            mine = await self._store.renew(self.worker, running=list(self._running))
            for model_id, task in self._running.items():
                if model_id not in mine:
                    task.cancel()
        free = _MAX_RUNNING - len(self._running)
        for model in await self._store.claim(self.worker, running=list(self._running), limit=free) if free else ():
            task = group.create_task(self._prepare(model))
            self._running[model.id] = task
            # Not in the task's own `finally`: a task cancelled before its first step does not get there.
            task.add_done_callback(partial(self._running.pop, model.id))

    async def _prepare(self, model: Model) -> None:
        """Prepares one model. An error becomes the model's failure or a line in the log; it never leaves the task."""
        try:
            try:
                self._allowances.check(model.source, model.load_options)
                await self._make_ready(model)
            except (ClaimLost, FilesDoomed, DatabaseUnavailable):
                raise
            except ServiceError as exc:
                await self._fail(model, self._reason_of(exc), exc.message)
            except OSError as exc:
                if exc.errno == errno.ENOSPC:
                    await self._fail(model, "DISK_FULL", f"{exc.strerror}; free space and prepare again")
                else:
                    message = f"the files can't be read ({exc}); check the path and its rights"
                    await self._fail(model, "MODEL_UNSUPPORTED", message)
            except Exception:
                log.exception("preparation of %s failed", model.id)
                await self._fail(model, "INTERNAL", "a bug in the registry; its log has the cause")
        except ClaimLost:
            log.info("preparation of %s ended elsewhere", model.id)
        except FilesDoomed:
            log.info("the files of %s are being removed; its preparation starts again", model.id)
        except DatabaseUnavailable as exc:
            log.warning("preparation of %s starts again later: %s", model.id, exc.message)
        except Exception:
            log.exception("the failure of the preparation of %s could not be stored", model.id)

    async def _fail(self, model: Model, reason: str, message: str) -> None:
        # A message may name a file of the model, in characters that neither Postgres nor a log can write.
        message = clean_text(message, _MAX_MESSAGE_CHARACTERS)
        log.warning("preparation of %s failed: %s: %s", model.id, reason, message)
        await self._store.fail(model.id, self.worker, Failure(reason=reason, message=message))

    async def _make_ready(self, model: Model) -> None:
        """Takes a model from its source to READY: download, convert, inspect, quantize."""
        check_path = None
        if model.source.kind is SourceKind.HUB:
            files = await self._download(model)
        elif model.source.kind is SourceKind.GGUF:
            files = await self._find_gguf(model)
        else:
            files = _Files(folder=Path(self._roots.folder(model.source.location, field="model.source.folder.path")))
            check_path = self._roots.check_inside
        if files.conversion is not None:
            await self._convert(model, files.conversion, files)
        inspection = await self._inspect(model, files.folder, check_path)
        commit_sha = files.commit_sha or inspection.digest
        folder, fidelity = files.folder, None
        if is_quantized(model):
            folder = quantized_folder(self._storekeeper.folders.root, model, commit_sha)
            await self._report_progress(model, Transfer(), "files ready to quantize", commit_sha=commit_sha)
            await self._storekeeper.reserve_space(
                model.id, self.worker, path=str(folder), total_bytes=inspection.weights.weight_bytes, make=False
            )
            build = await self._build(model, BuildKind.QUANTIZE, target=folder, source=files.folder)
            fidelity = build.fidelity
            inspection = merged(inspection, await self._inspect(model, folder))
        await self._store.finish(
            model.id,
            self.worker,
            commit_sha=commit_sha,
            files_path=str(folder),
            inspection=inspection,
            store_bytes=await self._storekeeper.bytes_of(str(folder)),
            base_path=str(files.folder) if folder != files.folder else "",
            fidelity=fidelity,
        )
        log.info("model %s is ready in %s", model.id, folder)
        if files.pickled is not None:
            # A task of its own: the claim is over, and the next round cancels running tasks without a claim.
            removal = self._storekeeper.remove_unused(str(files.pickled))
            clearing = asyncio.create_task(removal, name=f"clear-{model.id}")
            self._clearing.add(clearing)
            clearing.add_done_callback(self._clearing.discard)
            await asyncio.shield(clearing)

    async def _download(self, model: Model) -> _Files:
        """Fetches a hub repo into the store, unless another model brought the same commit.

        The child process tells the size before it downloads, so that the space is reserved first.
        """
        if model.commit_sha and (base := await self._base_of(model, model.commit_sha)):
            self._tokens.pop(model.id, None)
            return _Files(folder=base, commit_sha=model.commit_sha)
        job = Job(
            repo_id=model.source.location,
            revision=model.commit_sha or model.source.revision,
            models_dir=str(self._storekeeper.folders.root),
            name=model.id,
            token=self._tokens.get(model.id, ""),
            allow_pickle=self._allowances.pickle(model.source),
            with_code=self._allowances.code(model.source),
        )
        progress, last = _Progress(), Event(kind="")
        async with aclosing(self._downloader.fetch(job)) as events:
            async for event in events:
                last = event
                if event.kind == "waiting":
                    await self._report_progress(model, progress.transfer, event.message)
                    continue
                transfer = progress.note(event.done_bytes, event.total_bytes)
                if event.kind == "resolved":
                    await self._report_progress(model, transfer, "downloading", commit_sha=event.commit_sha)
                    await self._storekeeper.reserve_space(
                        model.id, self.worker, path=event.path, total_bytes=event.total_bytes
                    )
                elif progress.is_due():
                    await self._report_progress(model, transfer, "downloading")
        self._tokens.pop(model.id, None)
        if not last.pickled:
            return _Files(folder=Path(last.path), commit_sha=last.commit_sha)
        return _Files(
            folder=unpickled_folder(Path(last.path)),
            commit_sha=last.commit_sha,
            conversion=BuildKind.CONVERT_PICKLED,
            pickled=Path(last.path),
            converted_bytes=await self._storekeeper.bytes_of(last.path),
        )

    async def _find_gguf(self, model: Model) -> _Files:
        """Reads a GGUF file for its digest, which names the folder of its conversion."""
        source = Path(self._roots.file(model.source.location, field="model.source.gguf.path"))

        def read(reading: ReadProgress) -> str:
            with source.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise ModelUnsupported(f"{source.name} is no GGUF file; give a file that starts with `GGUF`")
            reading.total_bytes = source.stat().st_size
            return file_digest(source, reading=reading)

        digest = await self._read(model, "reading the file", read)
        commit_sha = f"sha256:{digest}"
        await self._report_progress(model, Transfer(), "file read", commit_sha=commit_sha)
        if base := await self._base_of(model, commit_sha):
            return _Files(folder=base, commit_sha=commit_sha)
        return _Files(
            folder=self._storekeeper.folders.root / f"{model.id}-{digest[:12]}",
            commit_sha=commit_sha,
            conversion=BuildKind.CONVERT_GGUF,
            # Files of 4 or 8 bits grow by more than this factor. The quota is then exceeded until the next download.
            converted_bytes=_UNPACKED * (await asyncio.to_thread(source.stat)).st_size,
        )

    async def _base_of(self, model: Model, commit_sha: str) -> Path | None:
        """Finds unquantized files of the same commit that another model brought."""
        path = await self._store.take_base(model, self.worker, commit_sha=commit_sha)
        whole = bool(path) and await asyncio.to_thread(os.path.isfile, f"{path}/config.json")
        return Path(path) if whole else None

    async def _convert(self, model: Model, kind: BuildKind, files: _Files) -> None:
        """Has a node convert the files into `files.folder`, unless an earlier preparation completed that folder."""
        config = files.folder / "config.json"
        total_bytes = files.converted_bytes
        if await asyncio.to_thread(config.is_file):
            total_bytes = await self._storekeeper.bytes_of(str(files.folder))
        await self._storekeeper.reserve_space(
            model.id, self.worker, path=str(files.folder), total_bytes=total_bytes, make=False
        )
        # Looks again: a complete folder that was about to be removed is gone once its space is reserved anew.
        if not await asyncio.to_thread(config.is_file):
            await self._build(model, kind, target=files.folder, source=files.pickled)

    async def _build(self, model: Model, kind: BuildKind, *, target: Path, source: Path | None) -> BuildState:
        """Has a node make the files in `target`; returns the finished build.

        Waits until a node is alive, and assigns the build to another node when its node is lost.
        """
        while True:
            seen = self._wakeups.generation
            build = await self._store.build_state(model.id, self.worker)
            if build.done and build.target_path == str(target):
                return build
            if build.failure is not None:
                await self._fail(model, build.failure.reason or "LOAD_FAILED", build.failure.message)
                raise ClaimLost  # The failure ended the preparation, and the claim with it.
            if not build.node_alive or build.target_path != str(target) or build.silent_s > _BUILD_SILENT_S:
                await self._store.assign_build(
                    model.id, self.worker, kind=kind, target_path=str(target), source_path=str(source or "")
                )
            await self._wakeups.wait(seen)

    async def _inspect(
        self, model: Model, folder: Path, check_path: Callable[[Path], None] | None = None
    ) -> Inspection:
        return await self._read(
            model, "reading the files", lambda reading: inspect_folder(folder, reading=reading, check_path=check_path)
        )

    async def _read(self, model: Model, message: str, read: Callable[[ReadProgress], T]) -> T:
        """Runs a reading function in a thread and reports its progress; stops it when cancelled."""
        reading, progress = ReadProgress(), _Progress()
        async with self._readers:
            thread = asyncio.create_task(asyncio.to_thread(read, reading))
            try:
                while not thread.done():
                    await asyncio.wait({thread}, timeout=_LOOK_EVERY_S)
                    transfer = progress.note(reading.done_bytes, reading.total_bytes)
                    if not thread.done() and progress.is_due():
                        await self._report_progress(model, transfer, message)
            finally:
                reading.stop.set()
                await asyncio.wait({thread})  # It stops within one block of 4 MiB.
        try:
            return thread.result()
        except Stopped:  # Only a cancelled preparation stops its reader.
            raise ClaimLost from None

    async def _report_progress(self, model: Model, transfer: Transfer, message: str, commit_sha: str = "") -> None:
        await self._store.progress(model.id, self.worker, message=message, transfer=transfer, commit_sha=commit_sha)


class _Progress:
    """How far one download or one reading is, and when its next event is due."""

    def __init__(self) -> None:
        self.transfer = Transfer()
        self._meter = Meter()
        self._reported = time.monotonic()

    def note(self, done_bytes: int, total_bytes: int) -> Transfer:
        """Takes one reading; returns it with rate and ETA."""
        rate = self._meter.at(done_bytes, time.monotonic())
        self.transfer = Transfer.of(done_bytes=done_bytes, total_bytes=total_bytes, rate_bytes_per_s=rate)
        return self.transfer

    def is_due(self) -> bool:
        """True at most once a second: an event is a row, and its watchers are people."""
        now = time.monotonic()
        if now - self._reported < _PROGRESS_EVERY_S:
            return False
        self._reported = now
        return True
