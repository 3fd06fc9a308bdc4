"""`client.models`: registered models and their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from headrace_client.errors import BY_REASON, DeadlineExceeded, HeadraceError, InvalidArgument, Unavailable
from headrace_client.progress import of_model, told
from headrace_client.rpc.convert.memory import advice_from_pb, catalog_entry_from_pb
from headrace_client.rpc.convert.models import (
    load_option_from_pb,
    model_event_from_pb,
    model_from_pb,
    model_to_pb,
    struct_of,
)
from headrace_client.rpc.convert.validations import attempt_from_pb, step_from_pb
from headrace_client.rpc.endpoint import STREAM_LIFE_S, Endpoint, new_request_id
from headrace_client.rpc.nodes import pages
from headrace_client.rpc.server_stream import ServerStream
from headrace_client.rpc.watch import watch
from headrace_client.values import (
    CatalogEntry,
    Listing,
    LoadOption,
    MemoryAdvice,
    Model,
    ModelEvent,
    ModelSource,
    ModelState,
    Quantization,
    ValidationAttempt,
    ValidationStep,
    choice,
)


class Models:
    """Models of the registry."""

    def __init__(self, registry: Endpoint) -> None:
        self._registry = registry

    def register(
        self,
        *,
        hub: str = "",
        folder: str | Path = "",
        gguf: str | Path = "",
        id: str = "",  # noqa: A002 - the resource's own word.
        revision: str = "",
        quantization: str = Quantization.NONE,
        load_options: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        hub_token: str = "",
        fit_bytes: int = 0,
    ) -> Model:
        """Registers a model from exactly one of: a hub repo, a folder, a GGUF file. No files move.

        Paths are on the registry's disk. An empty id is derived from the source. For a model that is registered already
        its value is returned; another model under the same id raises AlreadyExists. With `fit_bytes`, a coarser
        quantization is taken if the model needs more bytes with the one given; ModelTooLarge if none is enough.
        """
        sources = [(kind, str(at)) for kind, at in (("hub", hub), ("folder", folder), ("gguf", gguf)) if str(at)]
        if len(sources) != 1:
            raise InvalidArgument("give exactly one of hub=, folder=, gguf=", fields={"source": "exactly one"})
        kind, location = sources[0]
        pb = model_to_pb(
            source=ModelSource(kind=kind, location=location, revision=revision),
            model_id=id,
            quantization=choice(Quantization, quantization, "quantization"),
            load_options=dict(load_options or {}),
            labels=dict(labels or {}),
        )
        answer = self._registry.unary(
            "ModelService.RegisterModel",
            request_id=new_request_id(),
            model=pb,
            hub_token=hub_token,
            fit_bytes=fit_bytes,
        )
        return model_from_pb(answer.model)

    def get(self, model_id: str) -> Model:
        """Reads one model."""
        return model_from_pb(self._registry.unary("ModelService.GetModel", model_id=model_id).model)

    def list(self, filter: str = "") -> Listing[Model]:  # noqa: A002 - the contract's word.
        """Lists models by id, all pages; `filter` such as `state = READY AND id : smol`."""
        return Listing(pages(self._registry, "ModelService.ListModels", "models", model_from_pb, filter=filter))

    def delete(self, model_id: str, *, force: bool = False, etag: str = "") -> None:
        """Deletes a model; ModelInUse while leased, pinned or resident.

        With `force` its leases are lost and it is unloaded first: ModelInUse if its memory does not come back in time.
        """
        self._registry.unary(
            "ModelService.DeleteModel", request_id=new_request_id(), model_id=model_id, force=force, etag=etag
        )

    def estimate(
        self, model_id: str, *, batch_size: int = 1, context_size: int = 1024, n_hookpoints: int = 1
    ) -> MemoryAdvice:
        """Estimates device memory in every form, and where each fits; also before the files are fetched."""
        answer = self._registry.unary(
            "ModelService.EstimateMemory",
            model_id=model_id,
            batch_size=batch_size,
            context_size=context_size,
            n_hookpoints=n_hookpoints,
        )
        return advice_from_pb(answer)

    def catalog(self, *, fits_bytes: int = 0, category: str = "") -> Listing[CatalogEntry]:
        """Lists curated models, all pages; with `fits_bytes` only models that fit there in some form."""
        return Listing(
            pages(
                self._registry,
                "ModelService.ListCatalog",
                "entries",
                catalog_entry_from_pb,
                fits_bytes=fits_bytes,
                category=category,
            )
        )

    def load_options(self) -> Listing[LoadOption]:
        """Lists the load options that `register` takes."""
        answer = self._registry.unary("ModelService.ListLoadOptions")
        return Listing(load_option_from_pb(one) for one in answer.options)

    def prepare(self, model_id: str, *, hub_token: str = "", verify: bool = False) -> Model:
        """Starts fetching and converting the files; returns at once.

        A READY model whose files changed is unloaded and prepared anew. With `verify` all its files are read for that.
        """
        answer = self._registry.unary(
            "ModelService.PrepareModel",
            request_id=new_request_id(),
            model_id=model_id,
            hub_token=hub_token,
            verify=verify,
        )
        return model_from_pb(answer.model)

    def cancel_preparation(self, model_id: str) -> Model:
        """Stops a preparation; fetched files are kept for the next try."""
        answer = self._registry.unary("ModelService.CancelPreparation", request_id=new_request_id(), model_id=model_id)
        return model_from_pb(answer.model)

    def watch(self, model_id: str, *, after_seq: int = 0, deadline_s: float | None = None) -> Iterator[ModelEvent]:
        """Yields the model's events, a snapshot first; reconnects behind the last event seen."""

        def connect(seq: int, life_s: float | None) -> ServerStream:
            return self._registry.stream(
                "ModelService.WatchModel", life_s=life_s or STREAM_LIFE_S, model_id=model_id, after_seq=seq
            )

        return watch(connect, model_event_from_pb, after_seq=after_seq, deadline_s=deadline_s)

    def validate(
        self,
        model_id: str,
        *,
        load_options: Mapping[str, Any] | None = None,
        node_id: str = "",
        device_id: str = "",
        on_step: Callable[[ValidationStep], None] | None = None,
        deadline_s: float = 3600.0,
    ) -> ValidationAttempt:
        """Runs the test profile with these load options, or the model's own; returns the attempt, passed or not.

        An error that ends this call, such as Ctrl-C, stops the profile too.
        """
        fields: dict[str, Any] = {"model_id": model_id, "node_id": node_id, "device_id": device_id}
        if load_options is not None:
            fields["load_options"] = struct_of(load_options)
        attempt: ValidationAttempt | None = None
        for n_others in reversed(range(self._registry.n_replicas)):
            heard = False
            # No message comes during a load, however long it takes.
            stream = self._registry.stream(
                "ModelService.ValidateModel", silence_s=deadline_s, life_s=deadline_s, **fields
            )
            try:
                with stream as messages:
                    for message in messages:
                        heard = True
                        if message.HasField("attempt"):
                            attempt = attempt_from_pb(message.attempt)
                        elif on_step is not None:
                            on_step(step_from_pb(message.detail))
                break
            except Unavailable:
                if heard or not n_others:  # Once it has begun, another replica would begin it anew.
                    raise
        if attempt is None:
            raise DeadlineExceeded(f"the validation of {model_id} was not over within {deadline_s:.0f} s")
        return attempt

    def attempts(
        self, model_id: str, *, passed_only: bool = False, limit: int | None = None
    ) -> Listing[ValidationAttempt]:
        """Lists the attempts to load a model, validations too, the newest first, `limit` of them at most."""
        found = pages(
            self._registry,
            "ModelService.ListAttempts",
            "attempts",
            attempt_from_pb,
            model_id=model_id,
            passed_only=passed_only,
        )
        return Listing(islice(found, limit))

    def note_attempt(self, attempt_id: str, notes: str) -> ValidationAttempt:
        """Replaces the notes of an attempt."""
        answer = self._registry.unary(
            "ModelService.NoteAttempt", request_id=new_request_id(), attempt_id=attempt_id, notes=notes
        )
        return attempt_from_pb(answer.attempt)

    def adopt_attempt(self, attempt_id: str) -> Model:
        """Makes the load options of an attempt that passed those of its model; ModelInUse while that is resident."""
        answer = self._registry.unary("ModelService.AdoptAttempt", request_id=new_request_id(), attempt_id=attempt_id)
        return model_from_pb(answer.model)

    def wait_ready(
        self,
        model_id: str,
        on_progress: Callable[[Model], None] | None = None,
        deadline_s: float = 3600.0,
        *,
        progress: bool = False,
    ) -> Model:
        """Waits until the model is READY, with `progress` under a bar, which needs headrace[progress].

        Raises its failure's error class, or DeadlineExceeded.
        """
        with told(model_id, on_progress, progress=progress, measure=of_model) as tell:
            for event in self.watch(model_id, deadline_s=deadline_s):
                tell(event.model)
                if event.model.state is ModelState.READY:
                    return event.model
                if event.model.state is ModelState.FAILED:
                    failure = event.model.failure
                    if failure is None:
                        raise HeadraceError(f"preparing {model_id} failed", reason="FAILED")
                    kind = BY_REASON.get(failure.reason, HeadraceError)
                    raise kind(failure.message, reason=failure.reason, metadata={"model_id": model_id})
        raise DeadlineExceeded(f"the watch of {model_id} ended before the model was ready")
