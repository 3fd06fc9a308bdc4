"""Prepares models: hub repos are fetched, folders read in place, GGUF files converted by a node; all are inspected.

A worker claims what it prepares and renews the claim; whatever is unclaimed, as after a kill, any worker takes over
from the start. That is cheap: downloads resume, and a conversion that is complete is only read.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from headrace_chassis.errors import ServiceError
from headrace_registry.errors import DatabaseUnavailable, ModelUnsupported
from headrace_registry.hub.events import Event, Job
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
from headrace_registry.models.files import Inspection, Reading, Stopped, file_digest, inspect_folder
from headrace_registry.models.models import Failure, Model, SourceKind, Transfer
from headrace_registry.models.roots import ModelRoots
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.storekeeper import Storekeeper

log = logging.getLogger(__name__)

T = TypeVar("T")

# Preparations mostly wait for the network or for a node; reading disks is bounded separately.
_MAX_RUNNING = 16
_MAX_READERS = 2
_PROGRESS_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1
# A node that says nothing of a build for so long has forgotten it; it is given out again.
_BUILD_SILENT_S = 600.0
_MAX_TOKENS = 100
# A GGUF file becomes float32: at least twice as many bytes.
_UNPACKED = 2


class Downloader(Protocol):
    """Brings a hub repo to disk."""

    def fetch(self, job: Job) -> AsyncGenerator[Event, None]:
        """Yields events up to `done`; raises the hub errors."""
        ...


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
        self._tokens: dict[str, str] = {}

    def offer_token(self, model_id: str, token: str) -> None:
        """Keeps a hub token in memory for the preparation about to start; the oldest of too many is forgotten."""
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
        if self._running:
            mine = await self._store.renew(self.worker, running=list(self._running))
            for model_id, task in self._running.items():
                if model_id not in mine:
                    task.cancel()
        free = _MAX_RUNNING - len(self._running)
        for model in await self._store.claim(self.worker, running=list(self._running), limit=free) if free else ():
            task = group.create_task(self._prepare(model))
            self._running[model.id] = task
            task.add_done_callback(partial(self._ended, model.id))

    def _ended(self, model_id: str, _: asyncio.Task[None]) -> None:
        self._running.pop(model_id, None)

    async def _prepare(self, model: Model) -> None:
        """Prepares one model; whatever goes wrong ends in its state, not here."""
        prepare = {SourceKind.HUB: self._hub, SourceKind.FOLDER: self._folder, SourceKind.GGUF: self._gguf}
        try:
            try:
                self._allowances.check(model.source, model.load_options)
                await prepare[model.source.kind](model)
            except (ClaimLost, FilesDoomed, DatabaseUnavailable):
                raise
            except ServiceError as exc:
                await self._fail(model, self._reason_of(exc), exc.message)
            except OSError as exc:
                await self._fail(model, *_os_failure(exc))
            except Exception:
                log.exception("preparation of %s failed", model.id)
                await self._fail(model, "INTERNAL", "a bug in the registry; its log has the cause")
        except ClaimLost:
            log.info("preparation of %s ended elsewhere", model.id)
        except FilesDoomed:
            log.info("the files of %s are being removed; its preparation starts again", model.id)
        except DatabaseUnavailable as exc:
            log.warning("preparation of %s starts again later: %s", model.id, exc.message)

    async def _fail(self, model: Model, reason: str, message: str) -> None:
        log.warning("preparation of %s failed: %s: %s", model.id, reason, message)
        await self._store.fail(model.id, self.worker, Failure(reason=reason, message=message))

    async def _folder(self, model: Model) -> None:
        folder = Path(self._roots.folder(model.source.location, field="model.source.folder.path"))
        inspection = await self._inspect(model, folder, self._roots.check_inside)
        await self._finish(model, inspection.digest, folder, inspection)

    async def _hub(self, model: Model) -> None:
        if model.commit_sha and (base := await self._base_of(model, model.commit_sha)):
            self._tokens.pop(model.id, None)
            await self._finish(model, model.commit_sha, base, await self._inspect(model, base, None))
            return
        revision = model.commit_sha or model.source.revision
        job = Job(
            repo_id=model.source.location,
            revision=revision,
            models_dir=str(self._storekeeper.folders.root),
            name=model.id,
            token=self._tokens.get(model.id, ""),
            allow_pickle=self._allowances.pickle(model.source),
            with_code=self._allowances.code(model.source),
        )
        last = await self._download(model, job)
        self._tokens.pop(model.id, None)
        folder = await self._unpickled(model, Path(last.path)) if last.pickled else Path(last.path)
        await self._finish(model, last.commit_sha, folder, await self._inspect(model, folder, None))
        if last.pickled:
            # The preparation is over, so that whoever looks after those at work may cancel this one now.
            clearing = asyncio.create_task(self._storekeeper.give_up(last.path), name=f"clear-{model.id}")
            self._clearing.add(clearing)
            clearing.add_done_callback(self._clearing.discard)
            await asyncio.shield(clearing)

    async def _unpickled(self, model: Model, pickled: Path) -> Path:
        """Has a node write safetensors from pickled weights, once."""
        target = unpickled_folder(pickled)
        if not await self._keep(model, target, await self._storekeeper.bytes_of(str(pickled))):
            await self._build(model, BuildKind.CONVERT_PICKLED, target, pickled)
        return target

    async def _download(self, model: Model, job: Job) -> Event:
        """Brings the files to disk, with room made for them; returns the last event."""
        meter, last = _Meter(), Event(kind="")
        async with aclosing(self._downloader.fetch(job)) as events:
            async for event in events:
                last = event
                if event.kind == "waiting":
                    await self._progress(model, meter.latest, event.message)
                    continue
                transfer = meter.measure(event.done_bytes, event.total_bytes)
                if event.kind == "resolved":
                    await self._progress(model, transfer, "downloading", commit_sha=event.commit_sha)
                    await self._make_room(model, event.path, event.total_bytes)
                elif meter.due():
                    await self._progress(model, transfer, "downloading")
        return last

    async def _make_room(self, model: Model, path: str, total_bytes: int, *, make: bool = True) -> None:
        await self._storekeeper.make_room(model.id, self.worker, path=path, total_bytes=total_bytes, make=make)

    async def _keep(self, model: Model, folder: Path, total_bytes: int) -> bool:
        """Keeps a folder that is whole and returns True; else makes room for it. One that was to go is not there."""
        config = folder / "config.json"
        if await asyncio.to_thread(config.is_file):
            total_bytes = await self._storekeeper.bytes_of(str(folder))
        await self._make_room(model, str(folder), total_bytes, make=False)
        return await asyncio.to_thread(config.is_file)

    async def _gguf(self, model: Model) -> None:
        source = Path(self._roots.file(model.source.location, field="model.source.gguf.path"))
        digest = await self._read(model, "reading the file", lambda reading: _gguf_digest(source, reading))
        target = self._storekeeper.folders.root / f"{model.id}-{digest[:12]}"
        await self._progress(model, Transfer(), "file read", commit_sha=f"sha256:{digest}")
        base = await self._base_of(model, f"sha256:{digest}")
        if base is not None:
            target = base
        else:
            size_bytes = (await asyncio.to_thread(source.stat)).st_size
            # What is packed in less than half of float32 grows by more; the quota then holds from the next time on.
            if not await self._keep(model, target, _UNPACKED * size_bytes):
                await self._build(model, BuildKind.CONVERT_GGUF, target)
        await self._finish(model, f"sha256:{digest}", target, await self._inspect(model, target, None))

    async def _base_of(self, model: Model, commit_sha: str) -> Path | None:
        """Unquantized files of the same commit that are here already."""
        path = await self._store.take_base(model, self.worker, commit_sha=commit_sha)
        whole = bool(path) and await asyncio.to_thread(os.path.isfile, f"{path}/config.json")
        return Path(path) if whole else None

    async def _build(self, model: Model, kind: BuildKind, target: Path, source: Path | None = None) -> BuildState:
        """Has a node convert, or quantize what is in `source`, or unpickle it.

        Waits for a node to come, gives the build to another when one is lost.
        """
        while True:
            seen = self._wakeups.generation
            build = await self._store.build_state(model.id, self.worker)
            if build.done and build.target_path == str(target):
                return build
            if build.failure is not None:
                await self._fail(model, build.failure.reason or "LOAD_FAILED", build.failure.message)
                raise ClaimLost
            if _needs_node(build, str(target)):
                await self._store.assign_build(
                    model.id, self.worker, kind=kind, target_path=str(target), source_path=str(source or "")
                )
            await self._wakeups.wait(seen)

    async def _inspect(self, model: Model, folder: Path, check: Callable[[Path], None] | None) -> Inspection:
        return await self._read(
            model, "reading the files", lambda reading: inspect_folder(folder, reading=reading, check_path=check)
        )

    async def _read(self, model: Model, message: str, read: Callable[[Reading], T]) -> T:
        """Runs a reading function in a thread and reports how far it is; stops it when cancelled."""
        reading, meter = Reading(), _Meter()
        async with self._readers:
            thread = asyncio.create_task(asyncio.to_thread(read, reading))
            try:
                while not thread.done():
                    await asyncio.wait({thread}, timeout=_LOOK_EVERY_S)
                    transfer = meter.measure(reading.done_bytes, reading.total_bytes)
                    if not thread.done() and meter.due():
                        await self._progress(model, transfer, message)
            finally:
                reading.stop.set()
                await asyncio.wait({thread})  # It stops within one block of 4 MiB.
        try:
            return thread.result()
        except Stopped:  # It was told to after its last block: cancelled meanwhile.
            raise ClaimLost from None

    async def _progress(self, model: Model, transfer: Transfer, message: str, commit_sha: str = "") -> None:
        await self._store.progress(model.id, self.worker, message=message, transfer=transfer, commit_sha=commit_sha)

    async def _finish(self, model: Model, commit_sha: str, base: Path, inspection: Inspection) -> None:
        folder, fidelity = base, None
        if is_quantized(model):
            folder = quantized_folder(self._storekeeper.folders.root, model, commit_sha)
            await self._progress(model, Transfer(), "files ready to quantize", commit_sha=commit_sha)
            await self._make_room(model, str(folder), inspection.weights.weight_bytes, make=False)
            fidelity = (await self._build(model, BuildKind.QUANTIZE, folder, base)).fidelity
            inspection = merged(inspection, await self._inspect(model, folder, None))
        await self._store.finish(
            model.id,
            self.worker,
            commit_sha=commit_sha,
            files_path=str(folder),
            inspection=inspection,
            store_bytes=await self._storekeeper.bytes_of(str(folder)),
            base_path=str(base) if folder != base else "",
            fidelity=fidelity,
        )
        log.info("model %s is ready in %s", model.id, folder)


class _Meter:
    """Rate over the last seconds, and when the next progress event is due."""

    def __init__(self) -> None:
        self.latest = Transfer()
        self._points: list[tuple[float, int]] = []
        self._reported = time.monotonic()

    def measure(self, done_bytes: int, total_bytes: int) -> Transfer:
        """Takes one reading."""
        now = time.monotonic()
        self._points = [point for point in self._points if point[0] > now - 5.0][-100:]
        self._points.append((now, done_bytes))
        since, start = self._points[0]
        rate = (done_bytes - start) / (now - since) if now > since else 0.0
        self.latest = Transfer.of(done_bytes=done_bytes, total_bytes=total_bytes, rate_bytes_per_s=max(0.0, rate))
        return self.latest

    def due(self) -> bool:
        """True at most once a second."""
        now = time.monotonic()
        if now - self._reported < _PROGRESS_EVERY_S:
            return False
        self._reported = now
        return True


def _needs_node(build: BuildState, target_path: str) -> bool:
    if not build.node_id or not build.node_alive or build.target_path != target_path:
        return True
    return build.silent_s > _BUILD_SILENT_S


def _gguf_digest(path: Path, reading: Reading) -> str:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnsupported(f"{path.name} is no GGUF file; give a file that starts with `GGUF`")
    reading.total_bytes = path.stat().st_size
    return file_digest(path, reading=reading)


def _os_failure(exc: OSError) -> tuple[str, str]:
    if exc.errno == errno.ENOSPC:
        return "DISK_FULL", f"{exc.strerror}; make room and prepare again"
    return "MODEL_UNSUPPORTED", f"the files can't be read ({exc}); check the path and its rights"
