"""All extractions of a node: starting, finding, listing and cancelling them, and going on after a restart.

Each is recorded in `<data>/extractions`, so that a killed extractor goes on from there. Extractions of one set share
its passes (`drive.py`); `keeper` keeps the sets within their limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.ports import Confinement
from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora.chat_template import check_chat, template_digest
from headrace_extractor.corpora.tokens.proven import ProvenTokenizers
from headrace_extractor.errors import (
    ExtractionNotFound,
    Failure,
    FieldInvalid,
    ModelNotReady,
    ModelUnsupported,
    QueueFull,
    SetNotFound,
    reason_of,
)
from headrace_extractor.extractions.drive import SetPasses
from headrace_extractor.extractions.estimates import Estimate, RowCounter, estimate
from headrace_extractor.extractions.job import ExtractionJob
from headrace_extractor.extractions.ports import Corpora, Models
from headrace_extractor.extractions.records import Records
from headrace_extractor.extractions.services import Services
from headrace_extractor.extractions.values import Extraction, ExtractionState
from headrace_extractor.hookpoints.catalogue import check_isolation
from headrace_extractor.hookpoints.catalogues import Catalogues
from headrace_extractor.models import ModelInfo, check_files
from headrace_extractor.node.node import Node
from headrace_extractor.requests import checked_request_id
from headrace_extractor.sets import eviction
from headrace_extractor.sets.activation_set import ActivationSet, Kind
from headrace_extractor.sets.activation_sets import ActivationSets
from headrace_extractor.sets.eviction import Limits
from headrace_extractor.sets.identity import identity_of, new_manifest
from headrace_extractor.sets.keeper import SetKeeper
from headrace_extractor.sets.log_errors import log_errors_as_typed
from headrace_extractor.sets.ports import SetRegistry
from headrace_extractor.sets.spec import ExtractionSpec, Retention
from headrace_extractor.sets.verification import Verification
from headrace_log.manifest import Manifest

MAX_ACTIVE = 64
# Ended extractions are kept for people to look at, the oldest forgotten first. Their rows stay.
MAX_ENDED = 1000
# Readers often leave together: one report for all of them.
SEVERAL_LEAVE_S = 0.05
# Checks of a model's files at once: one may read them, while those of other models look at stamps alone.
_MAX_CHECKS = 4
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
        counter: RowCounter,
        device_id: str,
        registry: SetRegistry,
        limits: Limits | None = None,
        confinement: Confinement = IN_PROCESS,
    ) -> None:
        self.catalogues = Catalogues(confinement)
        self._confinement = confinement
        self._tokenizers = ProvenTokenizers(confinement)
        self.sets = ActivationSets(data_dir / "activations")
        self.keeper = SetKeeper(self.sets, limits or Limits(), registry=registry, epoch=lambda: node.epoch)
        self._services = Services(
            models=models,
            node=node,
            corpora=corpora,
            keeper=self.keeper,
            counter=counter,
            records=Records(data_dir / "extractions"),
        )
        self._device_id = device_id
        self._jobs: dict[str, ExtractionJob] = {}
        self._starting = asyncio.Lock()
        # Threads of their own: files that were touched are read as a whole, and heartbeats need the default threads.
        self._threads = ThreadPoolExecutor(_MAX_CHECKS, thread_name_prefix="model files")
        self._rates: dict[str, float] = {}  # Rows per second last seen, by model.

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
        """Starts an extraction, or returns one that already does or did the same work."""
        checked_request_id(request_id)
        # Two equal requests at once become one extraction.
        async with self._starting:
            if known := next((job for job in self._jobs.values() if request_id in job.request_ids), None):
                return known.value
            spec, model = await self.check(spec)
            with log_errors_as_typed():
                manifest = await self._new_manifest(spec, model)
                retained = self.sets.retained(manifest.set_id)
                if spec.retention.kind is Kind.WINDOW and retained.has_all_rows(spec.hookpoints):
                    spec = replace(spec, retention=Retention())  # The rows need not be computed: a plain read.
                if running := self._covering(spec, retained):
                    if request_id:
                        running.request_ids.add(request_id)
                        self._services.records.save_change(running.value, running.request_ids)
                    return running.value
                self._forget_oldest()
                job = self._new_job(spec, manifest, request_id)
            job.begin()
            return job.value

    async def check(self, spec: ExtractionSpec) -> tuple[ExtractionSpec, ModelInfo]:
        """Checks a request against model and corpus; returns it with hookpoints in forward order."""
        if not spec.model_id:
            raise FieldInvalid("spec.model_id is empty; name a registered model.", field="spec.model_id")
        _check_numbers(spec)
        model = await self.ready_model(spec.model_id)
        # Rows of a cached set would be those of the model as it was.
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, check_files, Path(model.files_path), model.files)
        corpus = self._services.corpora.get(spec.corpus_id)
        check_chat(spec.recipe, corpus_id=spec.corpus_id, is_chat=corpus.chat)
        if not corpus.tokenized and not model.tokenizer_digest:
            raise ModelUnsupported(
                f"{model.id} has no tokenizer.json, nor a tokenizer that it could be made of; extract from a corpus of "
                "token ids, or save the model's tokenizer with save_pretrained() into its folder and prepare it again."
            )
        names = tuple(point.name for point in await self.catalogues.resolve(model, spec.hookpoints))
        check_isolation(spec.recipe, await self.catalogues.of(model))
        await self._tokenizers.prove(model)
        if model.context_window and spec.recipe.context_size > model.context_window:
            raise FieldInvalid(
                f"spec.recipe.context_size is {spec.recipe.context_size}; {model.id} reads at most "
                f"{model.context_window} tokens.",
                field="spec.recipe.context_size",
            )
        return replace(spec, hookpoints=names), model

    async def ready_model(self, model_id: str) -> ModelInfo:
        """A registered model with files. Raises ModelNotFound and ModelNotReady."""
        model = await self._services.models.get_model(model_id)
        if not model.ready:
            raise ModelNotReady(
                f"Model {model.id} has no files yet; run PrepareModel (`headrace models add` does) and wait for READY.",
                resource=("Model", model.id),
            )
        return model

    async def estimate(self, spec: ExtractionSpec) -> Estimate:
        """Rows, bytes and seconds that a request would take, before any work."""
        spec, model = await self.check(spec)
        manifest = await self._new_manifest(spec, model)
        estimated = estimate(
            await self._services.counter.count(spec),
            max_rows=spec.max_rows,
            n_rows_cached=self.sets.retained(manifest.set_id).n_rows(spec.columns),
            row_bytes=manifest.row_bytes,
            rows_per_s=self._rates.get(model.id, 0.0),
        )
        new_bytes, available_bytes = await self.space_for(spec, model, estimated.n_rows)
        return replace(estimated, new_bytes=new_bytes, available_bytes=available_bytes)

    async def space_for(self, spec: ExtractionSpec, model: ModelInfo, n_rows: int) -> tuple[int, int]:
        """Bytes that so many rows of a checked request would add to the disk, and bytes that could be added."""
        manifest = await self._new_manifest(spec, model)
        of = self.sets.retained(manifest.set_id)
        index = of.index()
        new_bytes = eviction.promised(manifest, index, [(spec.columns, n_rows)])[0]
        known_bytes = eviction.promised(manifest, index, [])[0]
        return new_bytes - known_bytes, await self.keeper.available_bytes(of)

    def uses_corpus(self, corpus_id: str) -> bool:
        """True while an extraction that has not ended reads the corpus."""
        return any(not job.value.state.ended and job.value.spec.corpus_id == corpus_id for job in self._jobs.values())

    def recover(self) -> None:
        """Reads the records and goes on with the extractions that had not ended."""
        records = self._services.records
        for value, request_ids in records.load():
            of = self._set_of(value.spec, value.set_id, value.id)
            if value.state.ended or of.exists:
                try:
                    self._add_job(replace(value, path=str(of.folder)), of, request_ids)
                except ServiceError as exc:
                    if not of.is_window:
                        raise
                    of.delete()  # Which of its rows are kept can't be told, and no other extraction has them.
                    logger.error("the window of extraction %s is damaged: %s", value.id, exc.message)  # noqa: TRY400
                    why = f"The window of extraction {value.id} was damaged and is gone; start it again."
                    failure = Failure(reason=reason_of(exc), message=why, metadata=exc.metadata)
                    failed = replace(value, state=ExtractionState.FAILED, failure=failure, path=str(of.folder))
                    self._add_job(failed, of, request_ids)
                    records.save_change(failed, request_ids)
            else:
                logger.warning("extraction %s can't go on: its set is gone", value.id)
                records.forget(value.id)
        self.keeper.recover()
        for job in self._jobs.values():
            if job.value.state.ended:
                job.start_grace()
            else:
                job.begin()

    async def close(self) -> None:
        """Ends all tasks; extractions that have not ended go on at the next start."""
        await asyncio.gather(*(job.close() for job in self._jobs.values()))
        self.sets.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def report_changes(self, report: Callable[[ExtractionJob], Awaitable[None]], interval_s: float = 2.0) -> None:
        """Reports the sets of extractions that changed, every interval and soon after a set has lost a holder."""
        holder_left = self._services.holder_left
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await holder_left.wait()
                await asyncio.sleep(SEVERAL_LEAVE_S)
            holder_left.clear()
            for job in [job for job in self._jobs.values() if job.reported_seq != job.seq]:
                job.reported_seq = job.seq
                if job.value.rows_per_s:
                    self._rates[job.value.spec.model_id] = job.value.rows_per_s
                await report(job)

    def verify(self, set_id: str) -> Verification:
        """Begins to compare a RETAIN set with its digests. Raises SetNotFound and QueueFull."""
        if not self.sets.has(set_id):
            raise SetNotFound(
                f"There is no set {set_id[:64]!r} on this node; ListActivationSets of the registry lists them.",
                resource=("ActivationSet", set_id[:64]),
            )
        of = self.sets.retained(set_id)
        if any(isinstance(user, Verification) for user in of.users):
            raise QueueFull(f"Set {set_id} is being verified already; wait until that ends.", retry_after_s=10.0)
        return Verification(of, n_at_once=self.sets.n_threads)

    def report_all(self) -> None:
        """Marks every set for a report: the registry has a new epoch of this node."""
        for job in self._jobs.values():
            job.reported_seq = 0

    def _covering(self, spec: ExtractionSpec, retained: ActivationSet) -> ExtractionJob | None:
        """An active extraction of the same set that will have exactly the rows and columns asked for."""
        for job in self._jobs.values():
            its = job.value.spec
            same_rows = its.max_rows == spec.max_rows and its.allow_non_finite == spec.allow_non_finite
            goes_on = not job.value.state.ended and job.end_reason is None
            if job.set is retained and goes_on and same_rows and set(spec.hookpoints) == set(its.hookpoints):
                return job if spec.retention.kind is Kind.RETAIN else None
        return None

    def _forget_oldest(self) -> None:
        """Makes place for one more extraction. Raises QueueFull if too many are under way."""
        active = sum(not job.value.state.ended for job in self._jobs.values())
        if active >= MAX_ACTIVE:
            raise QueueFull(f"{active} extractions are under way, the most there can be.", retry_after_s=10.0)
        for job in [job for job in self.list() if job.value.state.ended][MAX_ENDED:]:
            if not job.holds_set and (job.task is None or job.task.done()):
                del self._jobs[job.value.id]
                job.set.users.remove(job)
                self._services.records.forget(job.value.id)

    def _new_job(self, spec: ExtractionSpec, manifest: Manifest, request_id: str) -> ExtractionJob:
        extraction_id = f"x{uuid.uuid4().hex[:12]}"
        of = self._set_of(spec, manifest.set_id, extraction_id)
        request_ids = (request_id,) if request_id else ()
        is_new = not of.exists
        if not is_new:
            of.add_columns(manifest.columns)
        try:
            if is_new:
                of.create(manifest, model_id=spec.model_id, corpus_id=spec.corpus_id)
            of.note_use()
            value = Extraction(id=extraction_id, spec=spec, set_id=of.id, path=str(of.folder))
            self._services.records.save(value, request_ids)
        except BaseException:
            if is_new:
                of.delete()
            raise
        return self._add_job(value, of, request_ids)

    def _set_of(self, spec: ExtractionSpec, set_id: str, extraction_id: str) -> ActivationSet:
        if spec.retention.kind is Kind.WINDOW:
            return self.sets.window(set_id, extraction_id)
        return self.sets.retained(set_id)

    def _add_job(self, value: Extraction, of: ActivationSet, request_ids: Iterable[str]) -> ExtractionJob:
        """Jobs of one set share its passes, which last as long as one of these jobs is known."""
        passes = next((job.passes for job in self._jobs.values() if job.set is of), None)
        job = ExtractionJob(
            value, self._services, of=of, passes=passes or SetPasses(of, self._services), request_ids=request_ids
        )
        self._jobs[value.id] = job
        return job

    async def _new_manifest(self, spec: ExtractionSpec, model: ModelInfo) -> Manifest:
        """The manifest that the set of a checked request has when it is new; its id is the set's id."""
        chat_template_digest = ""
        if spec.recipe.chat_template:
            chat_template_digest = await template_digest(model.files_path, self._confinement)
        identity = identity_of(
            spec,
            model,
            corpus_digest=self._services.corpora.get(spec.corpus_id).digest,
            compute_dtype=model.compute_dtype(self._device_id),
            chat_template_digest=chat_template_digest,
        )
        points = await self.catalogues.resolve(model, spec.hookpoints)
        return new_manifest(spec, identity, {point.name: point.shape for point in points})


def _check_numbers(spec: ExtractionSpec) -> None:
    if spec.max_rows < 0:
        raise FieldInvalid("spec.max_rows is negative; 0 means the whole corpus.", field="spec.max_rows")
    if spec.retention.kind is Kind.WINDOW and spec.retention.window_bytes < MIN_WINDOW_BYTES:
        raise FieldInvalid(
            f"spec.retention.window_bytes is {spec.retention.window_bytes}; it must be at least {MIN_WINDOW_BYTES}.",
            field="spec.retention.window_bytes",
        )
    if spec.retention.reader_grace_s < 0:
        raise FieldInvalid("spec.retention.reader_grace_s is negative.", field="spec.retention.reader_grace_s")
