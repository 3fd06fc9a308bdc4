"""Between messages about models and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace_client import values as v
from headrace_client.rpc.convert.common import failure_from_pb, time_from_pb, transfer_from_pb
from headrace_client.rpc.convert.enums import choice_of, state_of


def model_from_pb(pb: model_pb.Model) -> v.Model:
    """Reads a model."""
    kind = pb.source.WhichOneof("source")
    if kind == "hub":
        source = v.ModelSource(kind="hub", location=pb.source.hub.repo_id, revision=pb.source.hub.revision)
    else:
        source = v.ModelSource(kind=kind or "unknown", location=getattr(pb.source, kind).path if kind else "")
    architecture, fidelity = None, None
    if pb.HasField("architecture"):
        # A newer server may send fields that this client does not know.
        known = v.Architecture.__dataclass_fields__
        fields = (field.name for field in pb.architecture.DESCRIPTOR.fields if field.name in known)
        architecture = v.Architecture(**{name: getattr(pb.architecture, name) for name in fields})
    if pb.HasField("fidelity"):
        layers = tuple(
            v.LayerFidelity(layer=each.layer, cosine=each.cosine, relative_error=each.relative_error)
            for each in pb.fidelity.layers
        )
        fidelity = v.Fidelity(reference_dtype=pb.fidelity.reference_dtype, n_tokens=pb.fidelity.n_tokens, layers=layers)
    return v.Model(
        id=pb.id,
        source=source,
        state=state_of(model_pb.ModelState, "MODEL_STATE_", pb.state, v.ModelState),
        commit_sha=pb.commit_sha,
        quantization=quantization_from_pb(pb.quantization),
        load_options=MessageToDict(pb.load_options),
        labels=dict(pb.labels),
        failure=failure_from_pb(pb),
        transfer=transfer_from_pb(pb),
        architecture=architecture,
        n_parameters=pb.n_parameters,
        weight_bytes=pb.weight_bytes,
        parameters_by_dtype=dict(pb.parameters_by_dtype),
        files_path=pb.files_path,
        tokenizer_digest=pb.tokenizer_digest,
        etag=pb.etag,
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        fidelity=fidelity,
        card=v.ModelCard(license=pb.card.license, license_link=pb.card.license_link, dtype=pb.card.dtype)
        if pb.HasField("card")
        else None,
        store_bytes=pb.store_bytes,
        last_used_time=time_from_pb(pb, "last_used_time"),
    )


def load_option_from_pb(pb: models_pb.LoadOption) -> v.LoadOption:
    """Reads a load option."""
    return v.LoadOption(
        name=pb.name,
        values=pb.values,
        default=pb.default_value,
        about=pb.about,
        changes_numbers=pb.changes_numbers,
    )


def struct_of(options: Mapping[str, Any]) -> Struct:
    """Builds a JSON object."""
    struct = Struct()
    struct.update(dict(options))
    return struct


def quantization_from_pb(number: int) -> v.Quantization:
    """Reads a quantization; NONE for one that this client does not know."""
    return choice_of(model_pb.Quantization, "QUANTIZATION_", number, v.Quantization, v.Quantization.NONE)


def model_to_pb(
    *,
    source: v.ModelSource,
    model_id: str,
    quantization: v.Quantization,
    load_options: dict[str, Any],
    labels: dict[str, str],
) -> model_pb.Model:
    """Builds the fields of a model that RegisterModel reads."""
    pb = model_pb.Model(
        id=model_id, quantization=model_pb.Quantization.Value(f"QUANTIZATION_{quantization.name}"), labels=labels
    )
    if source.kind == "hub":
        pb.source.hub.repo_id = source.location
        pb.source.hub.revision = source.revision
    else:
        getattr(pb.source, source.kind).path = source.location
    if load_options:
        pb.load_options.update(load_options)
    return pb


def model_event_from_pb(pb: models_pb.WatchModelResponse) -> v.ModelEvent | None:
    """Reads an event; None for a heartbeat."""
    if pb.heartbeat:
        return None
    return v.ModelEvent(
        seq=pb.seq,
        model=model_from_pb(pb.model),
        message=pb.message,
        snapshot=pb.snapshot,
        time=time_from_pb(pb, "time"),
    )
