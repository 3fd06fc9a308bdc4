"""All extractions of a node: starting, finding, listing, cancelling them, and carrying on after a restart.

Each is recorded in `<data>/extractions`, so that a killed extractor takes up where it was. Those of one set share its
passes; `keeper` sees to the room that the sets take.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from headrace_extractor.corpora.chat_template import ChatTemplate, check_chat
from headrace_extractor.corpora.counting import RowCount
from headrace_extractor.errors import ExtractionNotFound, FieldInvalid, ModelNotReady, QueueFull
from headrace_extractor.extractions.drive import PassContext, SetPasses
from headrace_extractor.extractions.job import ExtractionJob, JobContext
from headrace_extractor.extractions.ports import Corpora, Models
from headrace_extractor.extractions.records import Records
from headrace_extractor.extractions.values import Extraction
from headrace_extractor.hookpoints import catalogue as hookpoints
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.node import Node
from headrace_extractor.requests import checked_request_id
from headrace_extractor.sets import eviction as cache
from headrace_extractor.sets.eviction import Limits
from headrace_extractor.sets.identity import identity_of, new_manifest
from headrace_extractor.sets.keeper import WINDOW_MARK, SetKeeper
from headrace_extractor.sets.log_errors import log_errors_as_typed
from headrace_extractor.sets.notes import SetNotes, note_use
from headrace_extractor.sets.ports import SetRegistry
from headrace_extractor.sets.spec import ExtractionSpec, Retention
from headrace_log import retention
from headrace_log.index import SegmentIndex
from headrace_log.manifest import Manifest

MAX_ACTIVE = 64
# Ended extractions are kept for people to look at, the oldest forgotten first. Their rows stay.
MAX_ENDED = 1000
# Readers often leave together.
SEVERAL_LET_GO_S = 0.05
MIN_WINDOW_BYTES = 1024 * 1024

logger = logging.getLogger(__name__)


class Extractions:
    """The extractions of this node."""

    def __init__(
        self,
        data_dir: Path,
        *,
        models: Models,
        corpora: Corpora,
        node: Node,
        count_rows: Callable[[ExtractionSpec], Awaitable[RowCount]],
        device_id: str,
        sets: SetRegistry,
        limits: Limits | None = None,
    ) -> None:
        self._records = Records(data_dir / "extractions")
        self._sets = data_dir / "activations"
        self._models = models
        self._corpora = corpora
        self._device_id = device_id
        self._jobs: dict[str, ExtractionJob] = {}
        self._passes: dict[Path, SetPasses] = {}
        self._starting = asyncio.Lock()
        self._reported: dict[str, int] = {}  # `seq` of the last report.
        self._rates: dict[str, float] = {}
        self._let_go = asyncio.Event()  # Some set has fewer holders: whoever wants to delete it should hear.
        self.keeper = SetKeeper(
            self._sets, limits or Limits(), registry=sets, held=self.held_folders, epoch=lambda: node.epoch
        )
        self._pass_context = PassContext(
            models=models, node=node, corpora=corpora, room=self.keeper, turns=WeakKeyDictionary()
        )
        self._context = JobContext(
            room=self.keeper, save=self._save_change, let_go=self._let_go.set, count_rows=count_rows
        )

    def get(self, extraction_id: str) -> ExtractionJob:
        """Raises ExtractionNotFound."""
        try:
            return self._jobs[extraction_id]
        except KeyError:
            raise ExtractionNotFound(
                f"There is no extraction {extraction_id!r} on this node; ListExtractions lists them.",
                resource=("Extraction", extraction_id),
            ) from None

    def list(self) -> list[ExtractionJob]:
        """All of them, the newest first."""
        return sorted(self._jobs.values(), key=lambda job: (-job.value.create_time, job.value.id))

    async def start(self, request_id: str, spec: ExtractionSpec) -> Extraction:
        """Starts an extraction, or returns one that already does or did what is asked for."""
        checked_request_id(request_id)
        # Two equal requests at once become one extraction.
        async with self._starting:
            if known := self._by_request(request_id):
                return known.value
            spec, model = await self.check(spec)
            identity = self._identity(spec, model)
            if running := self._covering(spec, identity):
                self._remember(running, request_id)
                self._save_change(running)
                return running.value
            self._check_room()
            with log_errors_as_typed():
                job = self._new_job(spec, model, identity, request_id)
            self._begin(job)
            return job.value

    async def check(self, spec: ExtractionSpec) -> tuple[ExtractionSpec, ModelInfo]:
        """Checks a request against model and corpus; returns it with hookpoints in forward order."""
        if not spec.model_id:
            raise FieldInvalid("spec.model_id is empty; name a registered model.", field="spec.model_id")
        _check_numbers(spec)
        model = await self._models.get_model(spec.model_id)
        if not model.ready:
            raise ModelNotReady(
                f"Model {model.id} has no files yet; run PrepareModel (`headrace models add` does) and wait for READY.",
                resource=("Model", model.id),
            )
        check_chat(spec.recipe, corpus_id=spec.corpus_id, is_chat=self._corpora.get(spec.corpus_id).chat)
        catalogue = hookpoints.catalogue_of(model)
        names = tuple(point.name for point in catalogue.resolve(spec.hookpoints))
        hookpoints.check_isolation(spec.recipe, catalogue)
        if model.context_window and spec.recipe.context_size > model.context_window:
            raise FieldInvalid(
                f"spec.recipe.context_size is {spec.recipe.context_size}; {model.id} reads at most "
                f"{model.context_window} tokens.",
                field="spec.recipe.context_size",
            )
        return replace(spec, hookpoints=names), model

    def uses_corpus(self, corpus_id: str) -> bool:
        """True while an extraction that has not ended reads the corpus."""
        return any(not job.value.state.ended and job.value.spec.corpus_id == corpus_id for job in self._jobs.values())

    def rate_of(self, model_id: str) -> float:
        """Rows per second last seen for a model; 0 while unknown."""
        return self._rates.get(model_id, 0.0)

    def rows_cached(self, spec: ExtractionSpec, model: ModelInfo) -> int:
        """Rows of a checked request that exist already."""
        folder = self._folder(self._identity(spec, model))
        if not (folder / "manifest.json").exists():
            return 0
        return SegmentIndex.load(folder).n_rows(spec.columns)

    def held_folders(self) -> set[Path]:
        """Folders of the sets that must stay now."""
        return {job.folder for job in self._jobs.values() if job.holds_set}

    def holders(self, folder: Path) -> Sequence[str]:
        """Who needs the set in a folder now: readers by name, extractions by id."""
        jobs = [job for job in self._jobs.values() if job.folder == folder and job.holds_set]
        readers = [reader.reader for job in jobs for reader in job.value.readers]
        return readers + [job.value.id for job in jobs if not job.value.state.ended or not job.value.readers]

    async def room_for(self, spec: ExtractionSpec, model: ModelInfo, n_rows: int) -> tuple[int, int]:
        """Bytes that so many rows of a checked request would add to the disk, and bytes that could be added."""
        identity = self._identity(spec, model)
        folder, manifest = self._folder(identity), self._manifest_of(spec, model, identity)
        index = SegmentIndex.load(folder)
        wants = [(spec.columns, n_rows)]
        new_bytes = cache.promised(manifest, index, wants)[0] - cache.promised(manifest, index, [])[0]
        return new_bytes, await self.keeper.available_bytes(folder)

    def recover(self) -> None:
        """Reads the records and carries on with what had not ended."""
        self._sets.mkdir(parents=True, exist_ok=True)
        for value, request_ids in self._records.load():
            if not value.state.ended and not (Path(value.path) / "manifest.json").exists():
                logger.warning("extraction %s can't be carried on: its set is gone", value.id)
                self._records.forget(value.id)
                continue
            self._jobs[value.id] = self._job(value, request_ids)
        self.keeper.recover()
        for job in self._jobs.values():
            if job.value.state.ended:
                job.end_unread()
            else:
                self._begin(job)

    async def close(self) -> None:
        """Ends all tasks; what had not ended goes on at the next start."""
        await asyncio.gather(*(job.close() for job in self._jobs.values()))

    async def report_changes(self, report: Callable[[ExtractionJob], Awaitable[None]], interval_s: float = 2.0) -> None:
        """Reports sets whose extraction changed, every interval and soon after somebody let go of one."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._let_go.wait()
                await asyncio.sleep(SEVERAL_LET_GO_S)
            self._let_go.clear()
            for job in [job for job in self._jobs.values() if self._reported.get(job.value.id) != job.seq]:
                self._reported[job.value.id] = job.seq
                self._rates[job.value.spec.model_id] = job.value.rows_per_s or self.rate_of(job.value.spec.model_id)
                await report(job)

    def report_all(self) -> None:
        """Marks every set for a report: the registry has a new epoch of this node."""
        self._reported.clear()

    def _begin(self, job: ExtractionJob) -> None:
        job.task = asyncio.create_task(job.run(), name=f"extraction-{job.value.id}")

    def _by_request(self, request_id: str) -> ExtractionJob | None:
        return next((job for job in self._jobs.values() if request_id in job.request_ids), None)

    def _covering(self, spec: ExtractionSpec, identity: dict[str, Any]) -> ExtractionJob | None:
        """An active extraction of the same set that will have all rows and columns asked for."""
        folder = self._folder(identity)
        for job in self._jobs.values():
            ours = job.value.spec
            same_rows = ours.max_rows == spec.max_rows and ours.allow_non_finite == spec.allow_non_finite
            if (
                not job.value.state.ended
                and job.stop is None
                and same_rows
                and not spec.retention.is_window
                and job.folder == folder
                and set(spec.hookpoints) == set(ours.hookpoints)
            ):
                return job
        return None

    def _remember(self, job: ExtractionJob, request_id: str) -> None:
        """Notes that a request was answered with this extraction."""
        if request_id:
            job.request_ids.add(request_id)

    def _check_room(self) -> None:
        active = sum(not job.value.state.ended for job in self._jobs.values())
        if active >= MAX_ACTIVE:
            raise QueueFull(f"{active} extractions are under way, the most there can be.", retry_after_s=10.0)
        ended = [job for job in self.list() if job.value.state.ended]
        for job in ended[MAX_ENDED:]:
            if not job.holds_set:
                del self._jobs[job.value.id]
                self._records.forget(job.value.id)

    def _new_job(
        self, spec: ExtractionSpec, model: ModelInfo, identity: dict[str, Any], request_id: str
    ) -> ExtractionJob:
        extraction_id = f"x{uuid.uuid4().hex[:12]}"
        manifest = self._manifest_of(spec, model, identity)
        folder = self._folder(identity)
        if spec.retention.is_window and not self._complete(folder, spec):
            folder = folder.with_name(f"{folder.name}{WINDOW_MARK}{extraction_id}")
        is_new = not (folder / "manifest.json").exists()
        if not is_new:
            Manifest.update(folder, lambda known: known.with_columns(manifest.columns))
        try:
            if is_new:
                manifest.save(folder)
                SetNotes(model_id=spec.model_id, corpus_id=spec.corpus_id).save(folder)
            note_use(folder)
            value = Extraction(id=extraction_id, spec=spec, set_id=manifest.set_id, path=str(folder))
            job = self._job(value, ())
            self._remember(job, request_id)
            self._records.save(job.value, job.request_ids)
        except BaseException:
            if is_new:
                retention.delete_set(folder)
            raise
        self._jobs[extraction_id] = job
        return job

    def _complete(self, folder: Path, spec: ExtractionSpec) -> bool:
        """True when a RETAIN set holds everything, so that even a WINDOW request is a plain read."""
        if not (folder / "manifest.json").exists():
            return False
        manifest, index = Manifest.load(folder), SegmentIndex.load(folder)
        return manifest.complete and index.n_rows(spec.hookpoints) == manifest.total_rows

    def _job(self, value: Extraction, request_ids: Iterable[str]) -> ExtractionJob:
        if value.spec.retention.is_window and WINDOW_MARK not in value.path:
            value = replace(value, spec=replace(value.spec, retention=Retention()))
        job = ExtractionJob(value, self._context, self._passes_of(value))
        job.request_ids.update(request_ids)
        return job

    def _passes_of(self, value: Extraction) -> SetPasses:
        folder = Path(value.path)
        if folder not in self._passes:
            self._passes[folder] = SetPasses(folder, self._pass_context)
        return self._passes[folder]

    def _manifest_of(self, spec: ExtractionSpec, model: ModelInfo, identity: dict[str, Any]) -> Manifest:
        return new_manifest(spec, identity, hookpoints.catalogue_of(model).shapes(spec.hookpoints))

    def _folder(self, identity: dict[str, Any]) -> Path:
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return self._sets / hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def _identity(self, spec: ExtractionSpec, model: ModelInfo) -> dict[str, Any]:
        return identity_of(
            spec,
            model,
            corpus_digest=self._corpora.get(spec.corpus_id).digest,
            compute_dtype=model.compute_dtype(self._device_id),
            chat_template_digest=ChatTemplate.load(model.files_path).digest if spec.recipe.chat_template else "",
        )

    def _save_change(self, job: ExtractionJob) -> None:
        self._records.save_change(job.value, job.request_ids)
        if job.value.state.ended:
            self._let_go.set()


def _check_numbers(spec: ExtractionSpec) -> None:
    if spec.max_rows < 0:
        raise FieldInvalid("spec.max_rows is negative; 0 means the whole corpus.", field="spec.max_rows")
    if spec.retention.is_window and spec.retention.window_bytes < MIN_WINDOW_BYTES:
        raise FieldInvalid(
            f"spec.retention.window_bytes is {spec.retention.window_bytes}; it must be at least {MIN_WINDOW_BYTES}.",
            field="spec.retention.window_bytes",
        )
    if spec.retention.reader_grace_s < 0:
        raise FieldInvalid("spec.retention.reader_grace_s is negative.", field="spec.retention.reader_grace_s")
