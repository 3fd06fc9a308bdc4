"""ModelService: registration, files, estimates and validations of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import model_service_pb2_grpc
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.watch import HEARTBEAT_INTERVAL_S, watch
from headrace_models.load_options import trusts_remote_code
from headrace_registry.errors import FieldInvalid, StateConflict
from headrace_registry.inputs import checked_id, checked_labels, checked_request_id, checked_text
from headrace_registry.models.allowances import Allowances
from headrace_registry.models.filters import parse_filter
from headrace_registry.models.models import ModelEvent, SourceKind
from headrace_registry.models.registration import Commits, check_folder, with_commit
from headrace_registry.models.roots import ModelRoots
from headrace_registry.models.validations import watch_attempt
from headrace_registry.paging import page_from
from headrace_registry.postgres.models.models import ModelStore, require_update
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.postgres.models.validations import ValidationStore
from headrace_registry.postgres.requests import Request
from headrace_registry.rpc.convert.catalog import list_catalog, list_load_options
from headrace_registry.rpc.convert.models import load_options_from_pb, model_event_to_pb, model_to_pb, new_model_from_pb
from headrace_registry.rpc.convert.validations import attempt_kind_from_pb, attempt_to_pb, step_messages
from headrace_registry.rpc.estimate import MemoryEstimates
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.deletion import Deletions
from headrace_registry.workers.freshness import Freshness
from headrace_registry.workers.preparation import Preparer

_DEFAULT_PAGE = 50


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Check, call the store, fill the answer."""

    def __init__(
        self,
        *,
        models: ModelStore,
        deletions: Deletions,
        preparations: PreparationStore,
        preparer: Preparer,
        validations: ValidationStore,
        roots: ModelRoots,
        allowances: Allowances,
        commits: Commits,
        freshness: Freshness,
        estimates: MemoryEstimates,
        wakeups: Wakeups,
        shutdown: Shutdown,
        heartbeat_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        self._models = models
        self._deletions = deletions
        self._preparations = preparations
        self._preparer = preparer
        self._validations = validations
        self._roots = roots
        self._allowances = allowances
        self._commits = commits
        self._freshness = freshness
        self._estimates = estimates
        self._wakeups = wakeups
        self._shutdown = shutdown
        self._heartbeat_s = heartbeat_s

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Any) -> pb.RegisterModelResponse:
        """Registers a model; no files move yet."""
        arguments = (request.model.SerializeToString(deterministic=True).hex(), *filter(None, [request.fit_bytes]))
        remembered = _request(request.request_id, "RegisterModel", *arguments)
        # Before anything that may have changed since the first call, such as the folder or the living nodes.
        answered = await self._models.answered(remembered)
        if answered is not None:
            return pb.RegisterModelResponse(model=model_to_pb(answered))
        new = await asyncio.to_thread(new_model_from_pb, request.model, self._roots)
        self._allowances.check(new.source, new.load_options)
        token = checked_text(request.hub_token, field="hub_token", max_length=1024)
        if request.fit_bytes < 0:
            raise FieldInvalid("fit_bytes", "must not be negative; 0 means no limit")
        if request.fit_bytes and new.source.kind is SourceKind.GGUF:
            raise FieldInvalid("fit_bytes", "a GGUF file shows its tensors only once it is converted; choose its form")
        if request.fit_bytes:
            await check_folder(new.source, self._preparer.confinement)
            new = await with_commit(new, self._commits, token=token)
            new = await self._estimates.fitted(new, request.fit_bytes, token=token)
        # A model that is registered already keeps its commit, without a question to the hub.
        known = await self._models.registered(new)
        if known is not None:
            await self._freshness.look(known)
        else:
            await check_folder(new.source, self._preparer.confinement)
            if not new.commit_sha:
                new = await with_commit(new, self._commits, token=token)
        return pb.RegisterModelResponse(model=model_to_pb(await self._models.register(new, remembered)))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """Reads one model."""
        return pb.GetModelResponse(model=model_to_pb(await self._models.get(_model_id(request.model_id))))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Lists a page of models."""
        terms = parse_filter(request.filter)
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("models", request.filter),
            default=_DEFAULT_PAGE,
            key_length=1,
        )
        models, token = await self._models.page(terms, page)
        token, total = await page.counted(models, token, lambda: self._models.count(terms))
        return pb.ListModelsResponse(
            models=[model_to_pb(model) for model in models], next_page_token=token, total_size=total
        )

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Any) -> pb.UpdateModelResponse:
        """Changes labels and load options."""
        wanted = require_update(request.update_mask.paths)
        arguments = (request.model.SerializeToString(deterministic=True).hex(), sorted(wanted))
        model_id = checked_id(request.model.id, field="model.id")
        load_options = load_options_from_pb(request.model.load_options) if "load_options" in wanted else None
        if load_options and trusts_remote_code(load_options):
            self._allowances.check((await self._models.get(model_id)).source, load_options)
        model = await self._models.update(
            model_id,
            labels=checked_labels(request.model.labels) if "labels" in wanted else None,
            load_options=load_options,
            etag=request.model.etag,
            request=_request(request.request_id, "UpdateModel", *arguments),
        )
        return pb.UpdateModelResponse(model=model_to_pb(model))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.DeleteModelResponse:
        """Deletes a model out of use; with force, also a model in use."""
        model_id = _model_id(request.model_id)
        remembered = _request(request.request_id, "DeleteModel", model_id, request.force, request.etag)
        await self._deletions.delete(
            model_id,
            force=request.force,
            etag=request.etag,
            actor=f"DeleteModel from {str(context.peer())[:100]}",
            request=remembered,
        )
        return pb.DeleteModelResponse()

    async def PrepareModel(self, request: pb.PrepareModelRequest, context: Any) -> pb.PrepareModelResponse:
        """Starts a preparation and answers at once."""
        # Offered before the start: a worker may claim the preparation at once.
        model_id = _model_id(request.model_id)
        token = checked_text(request.hub_token, field="hub_token", max_length=1024)
        self._preparer.sources.offer_token(model_id, token)
        remembered = _request(request.request_id, "PrepareModel", model_id, *filter(None, [request.verify]))
        # A repeated call does not take back what the first call prepared.
        if await self._models.answered(remembered) is None:
            await self._freshness.look(await self._models.get(model_id), verify=request.verify)
        model = await self._preparations.start(
            model_id, worker=self._preparer.worker, request=remembered, token_offered=bool(token)
        )
        return pb.PrepareModelResponse(model=model_to_pb(model))

    async def CancelPreparation(
        self, request: pb.CancelPreparationRequest, context: Any
    ) -> pb.CancelPreparationResponse:
        """Stops a preparation."""
        model_id = _model_id(request.model_id)
        remembered = _request(request.request_id, "CancelPreparation", model_id)
        model = await self._preparations.cancel(model_id, request=remembered)
        return pb.CancelPreparationResponse(model=model_to_pb(model))

    async def WatchModel(
        self, request: pb.WatchModelRequest, context: Any
    ) -> AsyncGenerator[pb.WatchModelResponse, None]:
        """Streams a snapshot, then every event. A heartbeat repeats the last event."""
        model_id = _model_id(request.model_id)
        if request.after_seq < 0:
            raise FieldInvalid("after_seq", "must not be negative; 0 means none of the past events")
        snapshot = await self._models.snapshot(model_id)
        yield model_event_to_pb(snapshot, snapshot=True)
        latest = _Latest(snapshot)
        # A number beyond the snapshot's is of another model that had this id: its events are over.
        after_seq = request.after_seq if 0 < request.after_seq <= snapshot.seq else snapshot.seq
        stream = watch(
            self._events(model_id, after_seq, latest),
            heartbeat=latest.heartbeat,
            shutdown=self._shutdown,
            interval_s=self._heartbeat_s,
        )
        async with aclosing(stream) as messages:
            async for message in messages:
                yield message

    async def _events(
        self, model_id: str, after_seq: int, latest: _Latest
    ) -> AsyncGenerator[pb.WatchModelResponse, None]:
        while True:
            seen = self._wakeups.generation
            events, begins_anew = await self._models.events_after(model_id, after_seq)
            for event in events:
                after_seq = event.seq
                latest.note(event, anew=begins_anew)
                yield model_event_to_pb(event, snapshot=begins_anew)
            if not events:
                await self._wakeups.wait(seen)

    async def EstimateMemory(self, request: pb.EstimateMemoryRequest, context: Any) -> pb.EstimateMemoryResponse:
        """Estimates memory in every form; changes nothing."""
        return await self._estimates.answer(request)

    async def ValidateModel(
        self, request: pb.ValidateModelRequest, context: Any
    ) -> AsyncGenerator[pb.ValidateModelResponse, None]:
        """Streams each step when it changes, and the finished attempt last."""
        model = await self._models.get(_model_id(request.model_id))
        options = load_options_from_pb(request.load_options) if request.HasField("load_options") else None
        self._allowances.check(model.source, model.load_options if options is None else options)
        attempt = await self._validations.start(
            model.id,
            node_id=checked_id(request.node_id, field="node_id") if request.node_id else "",
            device_id=checked_text(request.device_id, field="device_id", max_length=63),
            load_options=options,
        )
        stream = step_messages(watch_attempt(self._validations, self._wakeups, attempt))
        async with aclosing(self._shutdown.watching(stream)) as messages:
            async for message in messages:
                yield message

    async def ListAttempts(self, request: pb.ListAttemptsRequest, context: Any) -> pb.ListAttemptsResponse:
        """Lists a page of attempts, the newest first."""
        model_id = _model_id(request.model_id)
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("attempts", model_id, str(request.passed_only), str(request.kind)),
            default=_DEFAULT_PAGE,
            key_length=2,
        )
        which: dict[str, Any] = {"passed_only": request.passed_only, "kind": attempt_kind_from_pb(request.kind)}
        found, token = await self._validations.page(model_id, **which, page=page)
        token, total = await page.counted(found, token, lambda: self._validations.count(model_id, **which))
        return pb.ListAttemptsResponse(
            attempts=[attempt_to_pb(each) for each in found], next_page_token=token, total_size=total
        )

    async def NoteAttempt(self, request: pb.NoteAttemptRequest, context: Any) -> pb.NoteAttemptResponse:
        """Replaces the notes of an attempt."""
        checked_request_id(request.request_id)
        notes = checked_text(request.notes, field="notes", max_length=2000)
        return pb.NoteAttemptResponse(attempt=attempt_to_pb(await self._validations.note(_attempt_id(request), notes)))

    async def AdoptAttempt(self, request: pb.AdoptAttemptRequest, context: Any) -> pb.AdoptAttemptResponse:
        """Makes the load options of an attempt that passed those of its model."""
        attempt = await self._validations.get(_attempt_id(request))
        if not attempt.passed:
            raise StateConflict(
                f"attempt {attempt.id} did not pass; adopt one that did", resource=("attempt", attempt.id)
            )
        self._allowances.check((await self._models.get(attempt.model_id)).source, attempt.load_options)
        model = await self._models.update(
            attempt.model_id,
            labels=None,
            load_options=attempt.load_options,
            etag="",
            request=_request(request.request_id, "AdoptAttempt", attempt.id),
        )
        return pb.AdoptAttemptResponse(model=model_to_pb(model))

    async def ListCatalog(self, request: pb.ListCatalogRequest, context: Any) -> pb.ListCatalogResponse:
        """Lists a page of the catalog."""
        return list_catalog(request)

    async def ListLoadOptions(self, request: pb.ListLoadOptionsRequest, context: Any) -> pb.ListLoadOptionsResponse:
        """Lists the load options that models take."""
        return list_load_options()


class _Latest:
    """The last event that a watcher got; a heartbeat repeats it."""

    def __init__(self, event: ModelEvent) -> None:
        self._event = event

    def note(self, event: ModelEvent, *, anew: bool) -> None:
        if anew or event.seq >= self._event.seq:
            self._event = event

    def heartbeat(self) -> pb.WatchModelResponse:
        return model_event_to_pb(self._event, heartbeat=True)


def _attempt_id(request: pb.NoteAttemptRequest | pb.AdoptAttemptRequest) -> str:
    return checked_text(request.attempt_id, field="attempt_id", max_length=63)


def _model_id(value: str) -> str:
    return checked_id(value, field="model_id")


def _request(request_id: str, method: str, *arguments: Any) -> Request:
    return Request.of_call(checked_request_id(request_id), method, *arguments)
