"""Prepares models: downloads their files or finds them on the disk, has nodes convert and quantize them, inspects them.

A worker claims a preparation and renews the claim. A preparation without a claim, as after a kill, is taken over by any
worker and starts again. That is cheap: downloads resume, and a complete conversion is only inspected.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.ports import Confinement
from headrace_chassis.errors import ServiceError
from headrace_models.folder import TOKENIZER, has_older_tokenizer
from headrace_registry.errors import DatabaseUnavailable
from headrace_registry.inputs import clean_text
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.builds import (
    BuildFailed,
    BuildKind,
    BuildState,
    ClaimLost,
    FilesDoomed,
    is_quantized,
    merged,
    quantized_folder,
    tokenizer_folder,
)
from headrace_registry.models.files import (
    Inspection,
    ReadProgress,
    adopt_tokenizer,
    inspect_folder,
    with_tokenizer,
)
from headrace_registry.models.models import Failure, Model, SourceKind, Transfer
from headrace_registry.models.roots import ModelRoots
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.postgres.models.records import RecordStore
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.rounds import FailureCount, attempt, uncounted
from headrace_registry.workers.sources import Downloader, Files, Sources
from headrace_registry.workers.storekeeper import Storekeeper

log = logging.getLogger(__name__)

T = TypeVar("T")

# Preparations at work in this process mostly wait for the network; readers of disks have a limit of their own.
_MAX_RUNNING = 16
# With those that wait for a node, which may never come.
_MAX_CLAIMED = 144
# As long as the message of a node's failure may be.
_MAX_MESSAGE_CHARACTERS = 2000
# After so long without a report, a node has forgotten its build, and the build is assigned again.
_BUILD_SILENT_S = 600.0
# Whatever ends a build so often, such as a guard of the machine's memory, goes on doing so.
_MAX_INTERRUPTED = 5
# Before a build that was ended from outside is assigned again: its node may be about to stop.
_INTERRUPTED_PAUSE_S = 1.0
# The largest vocabularies with their merges.
_TOKENIZER_BYTES = 50_000_000


class Preparer:
    """The worker of one registry process. `run` it beside the server."""

    def __init__(
        self,
        *,
        store: PreparationStore,
        records: RecordStore,
        wakeups: Wakeups,
        roots: ModelRoots,
        storekeeper: Storekeeper,
        allowances: Allowances,
        downloader: Downloader,
        worker: str,
        reason_of: Callable[[ServiceError], str],
        confinement: Confinement = IN_PROCESS,
        failed: FailureCount = uncounted,
    ) -> None:
        self.confinement = confinement
        self.worker = worker
        self._store = store
        self._wakeups = wakeups
        self._storekeeper = storekeeper
        self.sources = Sources(
            store=store,
            records=records,
            roots=roots,
            storekeeper=storekeeper,
            allowances=allowances,
            downloader=downloader,
            worker=worker,
        )
        self._allowances = allowances
        self._reason_of = reason_of
        self._failed = failed
        self._clearing: set[asyncio.Task[None]] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._parked: set[str] = set()  # Of the running ones, those that wait for a node.

    async def run(self) -> None:
        """Runs until cancelled; then gives its claims back."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    seen = self._wakeups.generation
                    await attempt("preparations", partial(self._round, group), self._failed)
                    await self._wakeups.wait(seen)
        finally:
            await asyncio.gather(*self._clearing, return_exceptions=True)
            # Claims that can't be given back run out by themselves.
            await attempt("claims", partial(self._store.release, self.worker), self._failed)

    async def _round(self, group: asyncio.TaskGroup) -> None:
        """Renews claims, cancels preparations that lost theirs, and starts as many as there is capacity for."""
        if self._running:
            mine = await self._store.renew(self.worker, running=list(self._running))
            for model_id, task in self._running.items():
                if model_id not in mine:
                    task.cancel()
        free = min(_MAX_RUNNING - len(self._running) + len(self._parked), _MAX_CLAIMED - len(self._running))
        for model in await self._store.claim(self.worker, running=list(self._running), limit=free) if free > 0 else ():
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
            except (ServiceError, BuildFailed) as exc:
                told = (
                    exc.failure
                    if isinstance(exc, BuildFailed)
                    else Failure(reason=self._reason_of(exc), message=exc.message)
                )
                await self._fail(model, told.reason or "LOAD_FAILED", told.message)
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
        files = await self.sources.find(model)
        if files.conversion is not None:
            await self._convert(model, files.conversion, files)
        inspection = await self._inspect(model, files.folder, files.check_path, full=True)
        commit_sha = files.commit_sha or inspection.digest
        files, inspection, note = await self._with_tokenizer(model, files, inspection, commit_sha)
        folder, fidelity = files.folder, None
        if is_quantized(model):
            folder = quantized_folder(self._storekeeper.folders.root, model, commit_sha)
            await self.sources.report(model, Transfer(), "files ready to quantize", commit_sha=commit_sha)
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
            source_files=files.source,
            fidelity=fidelity,
            note=note,
        )
        log.info("model %s is ready in %s", model.id, folder)
        if files.leftover is not None:
            # A task of its own: the claim is over, and the next round cancels running tasks without a claim.
            removal = self._storekeeper.remove_unused(str(files.leftover))
            clearing = asyncio.create_task(removal, name=f"clear-{model.id}")
            self._clearing.add(clearing)
            clearing.add_done_callback(self._clearing.discard)
            await asyncio.shield(clearing)

    async def _convert(self, model: Model, kind: BuildKind, files: Files) -> None:
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
            await self._build(model, kind, target=files.folder, source=files.leftover)

    async def _with_tokenizer(
        self, model: Model, files: Files, inspection: Inspection, commit_sha: str
    ) -> tuple[Files, Inspection, str]:
        """Has a node make tokenizer.json where a repo or folder has its tokenizer in an older form.

        Returns the files with it, and otherwise the reason why there is none: the model then takes token ids alone.
        """
        older = has_older_tokenizer({stamp.name for stamp in inspection.files})
        if not older or files.conversion is not None or files.shared:
            return files, inspection, ""
        target = tokenizer_folder(self._storekeeper.folders.root, model, commit_sha)
        await self.sources.report(model, Transfer(), "files ready but for the tokenizer", commit_sha=commit_sha)
        await self._storekeeper.reserve_space(
            model.id, self.worker, path=str(target), total_bytes=_TOKENIZER_BYTES, make=False
        )
        try:
            if not await asyncio.to_thread((target / TOKENIZER).is_file):
                await self._build(model, BuildKind.CONVERT_TOKENIZER, target=target, source=files.folder)
        except BuildFailed as exc:
            return files, inspection, exc.failure.message
        if model.source.kind is SourceKind.FOLDER:  # Not ours to write to: the model is loaded through the links.
            files = replace(files, folder=target, source=inspection.files)
        else:
            await asyncio.to_thread(adopt_tokenizer, target, files.folder)
            files = replace(files, leftover=target)
        return files, await asyncio.to_thread(with_tokenizer, inspection, files.folder), ""

    async def _build(self, model: Model, kind: BuildKind, *, target: Path, source: Path | None) -> BuildState:
        """Has a node make the files in `target`; returns the finished build.

        Waits until a node is alive, and assigns the build to another node when its node is lost; meanwhile it takes no
        place of a preparation at work. Raises BuildFailed, also for a build that is ended from outside again and again.
        """
        self._parked.add(model.id)
        node_id, n_interrupted = "", 0
        try:
            while True:
                seen = self._wakeups.generation
                build = await self._store.build_state(model.id, self.worker)
                if build.done and build.target_path == str(target):
                    return build
                if build.failure is not None and build.target_path == str(target):
                    raise BuildFailed(build.failure)
                if node_id and not build.node_id and build.target_path == str(target):
                    n_interrupted += 1
                    if n_interrupted > _MAX_INTERRUPTED:
                        message = (
                            f"the build was ended from outside {n_interrupted} times, the last time on node {node_id}, "
                            "as by a guard of its memory; look at the log of its system, then prepare again"
                        )
                        raise BuildFailed(Failure(reason="RUNNER_LOST", message=message))
                    await asyncio.sleep(_INTERRUPTED_PAUSE_S)
                if not build.node_alive or build.target_path != str(target) or build.silent_s > _BUILD_SILENT_S:
                    node_id = await self._store.assign_build(
                        model.id, self.worker, kind=kind, target_path=str(target), source_path=str(source or "")
                    )
                await self._wakeups.wait(seen)
        finally:
            self._parked.discard(model.id)

    async def _inspect(
        self, model: Model, folder: Path, check_path: Callable[[Path], None] | None = None, *, full: bool = False
    ) -> Inspection:
        """Inspects a folder, with `full` one that must hold full weights."""

        def inspect(reading: ReadProgress) -> Inspection:
            return inspect_folder(
                folder, reading=reading, check_path=check_path, confinement=self.confinement, full=full
            )

        return await self.sources.read(model, "reading the files", inspect)
