"""The files that a preparation starts from: downloaded, found on the disk, or brought by another model."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from headrace_chassis.meters import Meter
from headrace_models.folder import FileStamp, changed_files
from headrace_registry.errors import HubGated
from headrace_registry.hub.events import Event, Job
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.builds import BuildKind, ClaimLost, unpickled_folder
from headrace_registry.models.files import ReadProgress, Stopped, read_source
from headrace_registry.models.models import Model, SourceKind, Transfer
from headrace_registry.models.roots import ModelRoots
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.postgres.models.records import RecordStore
from headrace_registry.workers.storekeeper import Storekeeper

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_READERS = 2
_PROGRESS_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1
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
class Files:
    """A model's unquantized files in `folder`, or the files that a node has to convert into it."""

    folder: Path
    commit_sha: str = ""  # Empty for a registered folder: its inspection computes the digest.
    conversion: BuildKind | None = None  # None: `folder` is complete.
    leftover: Path | None = None  # Folder to convert from, or made for it, and to remove once the model is READY.
    shared: bool = False  # True for files that another model brought.
    converted_bytes: int = 0  # Space to reserve for the conversion.
    check_path: Callable[[Path], None] | None = None  # Raises an error for a file that may not be read.
    source: tuple[FileStamp, ...] = ()  # The GGUF file, or its parts; the files of a registered folder.


class Sources:
    """Finds the files of models, for one worker; reads files and reports progress for it too."""

    def __init__(
        self,
        *,
        store: PreparationStore,
        records: RecordStore,
        roots: ModelRoots,
        storekeeper: Storekeeper,
        allowances: Allowances,
        downloader: Downloader,
        worker: str,
    ) -> None:
        self._worker = worker
        self._store = store
        self._records = records
        self._roots = roots
        self._storekeeper = storekeeper
        self._allowances = allowances
        self._downloader = downloader
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

    async def find(self, model: Model) -> Files:
        """Returns the files of a model's source. Damaged files of an earlier preparation are removed before."""
        await self._discard_damaged(model)
        if model.source.kind is SourceKind.HUB:
            return await self._download(model)
        if model.source.kind is SourceKind.GGUF:
            return await self._find_gguf(model)
        folder = self._roots.folder(model.source.location, field="model.source.folder.path")
        return Files(folder=Path(folder), check_path=self._roots.check_inside)

    async def read(self, model: Model, message: str, read: Callable[[ReadProgress], T]) -> T:
        """Runs a reading function in a thread and reports its progress; stops it when cancelled."""
        reading, progress = ReadProgress(), _Progress()
        async with self._readers:
            thread = asyncio.create_task(asyncio.to_thread(read, reading))
            try:
                while not thread.done():
                    await asyncio.wait({thread}, timeout=_LOOK_EVERY_S)
                    transfer = progress.note(reading.done_bytes, reading.total_bytes)
                    if not thread.done() and progress.is_due():
                        await self.report(model, transfer, message)
            finally:
                reading.stop.set()
                await asyncio.wait({thread})  # It stops within one block of 4 MiB.
        try:
            return thread.result()
        except Stopped:  # Only a cancelled preparation stops its reader.
            raise ClaimLost from None

    async def report(self, model: Model, transfer: Transfer, message: str, commit_sha: str = "") -> None:
        """Stores the progress of a preparation. Raises ClaimLost."""
        await self._store.progress(model.id, self._worker, message=message, transfer=transfer, commit_sha=commit_sha)

    async def _discard_damaged(self, model: Model) -> None:
        """Removes files of an earlier preparation from the store that are not as they were; they are made anew."""
        record = await self._records.read(model.id)
        if record is None or not record.distrusted or not self._storekeeper.folders.owns(record.path):
            return
        folder = Path(record.path)

        def differing(reading: ReadProgress) -> list[str]:
            reading.total_bytes = sum(stamp.size_bytes for stamp in record.files)
            return changed_files(folder, record.files, digest_all=True, on_bytes=reading.add)

        damaged = await self.read(model, "comparing the files with their digests", differing)
        if damaged:
            log.warning("files of %s in the store are not as they were: %s", model.id, ", ".join(damaged[:5]))
            # All of the folder: what a node made of other files can only be made as a whole.
            await asyncio.to_thread(self._storekeeper.folders.discard, record.path)

    async def _download(self, model: Model) -> Files:
        """Fetches a hub repo into the store, unless another model brought the same commit.

        The child process tells the size before it downloads, so that the space is reserved first.
        """
        if model.commit_sha and (base := await self._base_of(model, model.commit_sha)):
            self._tokens.pop(model.id, None)
            return Files(folder=base, commit_sha=model.commit_sha, shared=True)
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
        async with aclosing(self._fetched(model, job)) as events:
            async for event in events:
                last = event
                if event.kind == "waiting":
                    await self.report(model, progress.transfer, event.message)
                    continue
                transfer = progress.note(event.done_bytes, event.total_bytes)
                if event.kind == "resolved":
                    await self.report(model, transfer, "downloading", commit_sha=event.commit_sha)
                    await self._storekeeper.reserve_space(
                        model.id, self._worker, path=event.path, total_bytes=event.total_bytes
                    )
                elif progress.is_due():
                    await self.report(model, transfer, "downloading")
        self._tokens.pop(model.id, None)
        if not last.pickled:
            return Files(folder=Path(last.path), commit_sha=last.commit_sha)
        return Files(
            folder=unpickled_folder(Path(last.path)),
            commit_sha=last.commit_sha,
            conversion=BuildKind.CONVERT_PICKLED,
            leftover=Path(last.path),
            converted_bytes=await self._storekeeper.bytes_of(last.path),
        )

    async def _fetched(self, model: Model, job: Job) -> AsyncGenerator[Event, None]:
        """Yields the downloader's events. A repo that is closed for want of a lost token says so."""
        try:
            async with aclosing(self._downloader.fetch(job)) as events:
                async for event in events:
                    yield event
        except HubGated as exc:
            if job.token or not await self._store.token_was_offered(model.id):
                raise
            raise HubGated(
                f"{job.repo_id} needs a hub token, and the registry that was given one has ended since: a token is "
                "never stored, so prepare the model again with it"
            ) from exc

    async def _find_gguf(self, model: Model) -> Files:
        """Reads a GGUF file, or its parts, for their digest, which names the folder of their conversion."""
        source = Path(self._roots.file(model.source.location, field="model.source.gguf.path"))
        parts, digest = await self.read(
            model, "reading the file", lambda reading: read_source(source, reading, self._roots.check_inside)
        )
        commit_sha = f"sha256:{digest}"
        await self.report(model, Transfer(), "file read", commit_sha=commit_sha)
        if base := await self._base_of(model, commit_sha):
            return Files(folder=base, commit_sha=commit_sha, source=parts)
        return Files(
            folder=self._storekeeper.folders.root / f"{model.id}-{digest[:12]}",
            commit_sha=commit_sha,
            conversion=BuildKind.CONVERT_GGUF,
            # Files of 4 or 8 bits grow by more than this factor. The quota is then exceeded until the next download.
            converted_bytes=_UNPACKED * sum(part.size_bytes for part in parts),
            source=parts,
        )

    async def _base_of(self, model: Model, commit_sha: str) -> Path | None:
        """Finds unquantized files of the same commit that another model brought."""
        path = await self._store.take_base(model, self._worker, commit_sha=commit_sha)
        whole = bool(path) and await asyncio.to_thread(os.path.isfile, f"{path}/config.json")
        return Path(path) if whole else None


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
