"""Between messages and models, in pairs: `x_from_pb` checks values from outside, `x_to_pb` is total."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from google.protobuf import json_format, struct_pb2

from headrace.registry.v1 import model_pb2, model_service_pb2, node_service_pb2
from headrace_models.errors import LoadOptionInvalid
from headrace_models.folder import FileStamp
from headrace_models.gguf import parts_of
from headrace_models.load_options import checked_options
from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_id, checked_labels, clean_text
from headrace_registry.models import models as m
from headrace_registry.models.builds import BuildKind
from headrace_registry.models.identifiers import checked_repo
from headrace_registry.models.roots import ModelRoots
from headrace_registry.residency.desired import Build
from headrace_registry.rpc.convert.residencies import (
    failure_to_pb,
    fill_time,
    finite,
    time_to_pb,
    transfer_to_pb,
)

_MODEL_STATES = {state: model_pb2.ModelState.Value(f"MODEL_STATE_{state}") for state in m.ModelState}
_QUANTIZATIONS = {q: model_pb2.Quantization.Value(f"QUANTIZATION_{q}") for q in m.Quantization}
_QUANTIZATION_FROM = {number: value for value, number in _QUANTIZATIONS.items()} | {
    model_pb2.QUANTIZATION_UNSPECIFIED: m.Quantization.NONE
}
_BUILD_KINDS = {kind: node_service_pb2.BuildKind.Value(f"BUILD_KIND_{kind}") for kind in BuildKind}


def source_from_pb(message: model_pb2.ModelSource, roots: ModelRoots) -> m.Source:
    """Checks repo or path. Paths become real paths under the roots."""
    kind = message.WhichOneof("source")
    if kind == "hub":
        return checked_repo(message.hub.repo_id, message.hub.revision)
    if kind == "folder":
        path = roots.folder(message.folder.path, field="model.source.folder.path")
        return m.Source(kind=m.SourceKind.FOLDER, location=path)
    if kind == "gguf":
        path = roots.file(message.gguf.path, field="model.source.gguf.path")
        try:
            parts_of(Path(path))
        except ValueError as exc:
            raise FieldInvalid("model.source.gguf.path", str(exc)) from exc
        return m.Source(kind=m.SourceKind.GGUF, location=path)
    raise FieldInvalid("model.source", "set one of `hub`, `folder`, `gguf`")


def new_model_from_pb(message: model_pb2.Model, roots: ModelRoots) -> m.NewModel:
    """Checks the fields of a model that RegisterModel reads; the others are output only."""
    quantization = _QUANTIZATION_FROM.get(message.quantization)
    if quantization is None:
        raise FieldInvalid("model.quantization", f"{message.quantization} is no quantization of this version")
    return m.NewModel(
        id=checked_id(message.id, field="model.id") if message.id else "",
        source=source_from_pb(message.source, roots),
        quantization=quantization,
        load_options=load_options_from_pb(message.load_options),
        labels=checked_labels(message.labels),
    )


def load_options_from_pb(message: struct_pb2.Struct) -> dict[str, Any]:
    """Checks the options. Raises FieldInvalid for an option that is unknown, or whose value is not of its type."""
    try:
        return checked_options(json_format.MessageToDict(message))
    except LoadOptionInvalid as exc:
        raise FieldInvalid("load_options", str(exc)) from exc
    except ValueError as exc:  # JSON has no NaN and no infinity, and protobuf refuses to write them.
        raise FieldInvalid("load_options", "a number in it is not finite; use JSON's numbers") from exc


def model_to_pb(model: m.Model) -> model_pb2.Model:
    """Total. Fills nested messages in place, which is faster: a page holds up to a thousand models."""
    message = model_pb2.Model(
        id=model.id,
        commit_sha=model.commit_sha,
        quantization=_QUANTIZATIONS[model.quantization],
        state=_MODEL_STATES[model.state],
        failure=failure_to_pb(model.failure) if model.failure else None,
        transfer=transfer_to_pb(model.transfer) if model.transfer else None,
        n_parameters=model.n_parameters,
        weight_bytes=model.weight_bytes,
        parameters_by_dtype=model.parameters_by_dtype or None,
        files_path=model.files_path,
        tokenizer_digest=model.tokenizer_digest,
        labels=model.labels or None,
        etag=model.etag,
        fidelity=fidelity_to_pb(model.fidelity) if model.fidelity else None,
        store_bytes=model.store_bytes,
        files=[_file_to_pb(stamp) for stamp in model.files] or None,
        card=model_pb2.ModelCard(**asdict(model.card)) if model.card else None,
    )
    source = model.source
    if source.kind is m.SourceKind.HUB:
        message.source.hub.repo_id, message.source.hub.revision = source.location, source.revision
    elif source.kind is m.SourceKind.FOLDER:
        message.source.folder.path = source.location
    else:
        message.source.gguf.path = source.location
    if model.architecture:
        _fill_architecture(message.architecture, model.architecture)
    fill_time(message.create_time, model.create_time)
    fill_time(message.update_time, model.update_time)
    if model.last_used_time:
        fill_time(message.last_used_time, model.last_used_time)
    if model.load_options:
        message.load_options.update(model.load_options)
    return message


def quantization_to_pb(quantization: m.Quantization) -> model_pb2.Quantization.ValueType:
    """Total."""
    return _QUANTIZATIONS[quantization]


def build_to_pb(build: Build) -> node_service_pb2.Build:
    """Total."""
    return node_service_pb2.Build(
        model=model_to_pb(build.model),
        target_path=build.target_path,
        source_path=build.source_path,
        kind=_BUILD_KINDS[build.kind],
    )


def fidelity_to_pb(fidelity: m.Fidelity) -> model_pb2.Fidelity:
    """Total."""
    return model_pb2.Fidelity(
        reference_dtype=fidelity.reference_dtype,
        n_tokens=fidelity.n_tokens,
        layers=[
            model_pb2.LayerFidelity(layer=each.layer, cosine=each.cosine, relative_error=each.relative_error)
            for each in fidelity.layers
        ],
    )


def fidelity_from_pb(message: model_pb2.Fidelity) -> m.Fidelity:
    """Takes the node's numbers; a number that is not finite becomes 0, since JSON can't store it."""
    return m.Fidelity(
        reference_dtype=clean_text(message.reference_dtype, 63),
        n_tokens=message.n_tokens,
        layers=tuple(
            m.LayerFidelity(layer=each.layer, cosine=finite(each.cosine), relative_error=finite(each.relative_error))
            for each in message.layers
        ),
    )


def model_event_to_pb(
    event: m.ModelEvent, *, snapshot: bool = False, heartbeat: bool = False
) -> model_service_pb2.WatchModelResponse:
    """Total."""
    return model_service_pb2.WatchModelResponse(
        seq=event.seq,
        time=time_to_pb(event.time),
        model=model_to_pb(event.model),
        message=event.message,
        snapshot=snapshot,
        heartbeat=heartbeat,
    )


def _file_to_pb(stamp: FileStamp) -> model_pb2.ModelFile:
    return model_pb2.ModelFile(
        name=stamp.name,
        size_bytes=stamp.size_bytes,
        mtime_ns=stamp.mtime_ns,
        inode=stamp.inode,
        sha256=stamp.sha256,
    )


def _fill_architecture(message: model_pb2.Architecture, architecture: m.Architecture) -> None:
    message.model_type = architecture.model_type
    message.class_name = architecture.class_name
    message.n_layers = architecture.n_layers
    message.d_model = architecture.d_model
    message.n_heads = architecture.n_heads
    message.n_kv_heads = architecture.n_kv_heads
    message.d_head = architecture.d_head
    message.d_mlp = architecture.d_mlp
    message.vocab_size = architecture.vocab_size
    message.context_window = architecture.context_window
    message.tied_embeddings = architecture.tied_embeddings
