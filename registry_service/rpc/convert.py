"""Between messages and values, in pairs: `x_from_pb` checks what comes from outside, `x_to_pb` is total."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf import json_format, struct_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import transfer_pb2
from headrace.registry.v1 import activation_set_service_pb2 as set_pb
from headrace.registry.v1 import model_pb2, model_service_pb2, residency_pb2, residency_service_pb2

from registry_service import models as m
from registry_service.errors import FieldInvalid
from registry_service.identifiers import checked_id, checked_labels, checked_repo
from registry_service.leases import Lease
from registry_service.load_options import checked_load_options
from registry_service.nodes import Device, DeviceKind, Node, NodeState
from registry_service.paths import ModelRoots
from registry_service.pins import Pin
from registry_service.residency import Residency, ResidencyState
from registry_service.residency_events import ResidencyEvent
from registry_service.sets import ActivationSet, SetReport

T = TypeVar("T")

_MODEL_STATES = {state: model_pb2.ModelState.Value(f"MODEL_STATE_{state}") for state in m.ModelState}
_QUANTIZATIONS = {q: model_pb2.Quantization.Value(f"QUANTIZATION_{q}") for q in m.Quantization}
_RESIDENCY_STATES = {s: residency_pb2.ResidencyState.Value(f"RESIDENCY_STATE_{s}") for s in ResidencyState}
_DEVICE_KINDS = {kind: residency_pb2.DeviceKind.Value(f"DEVICE_KIND_{kind}") for kind in DeviceKind}
_NODE_STATES = {state: residency_pb2.NodeState.Value(f"NODE_STATE_{state}") for state in NodeState}

_QUANTIZATION_FROM = {number: value for value, number in _QUANTIZATIONS.items()} | {
    model_pb2.QUANTIZATION_UNSPECIFIED: m.Quantization.NONE
}
_RESIDENCY_STATE_FROM: dict[int, ResidencyState] = {number: value for value, number in _RESIDENCY_STATES.items()}
_DEVICE_KIND_FROM = {number: value for value, number in _DEVICE_KINDS.items()}


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def time_to_pb(value: datetime) -> Timestamp:
    """An aware datetime."""
    since = value - _EPOCH  # Four times as fast as FromDatetime, which shows in pages of a thousand models.
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def transfer_to_pb(transfer: m.Transfer) -> transfer_pb2.Transfer:
    """Total."""
    return transfer_pb2.Transfer(
        done_bytes=transfer.done_bytes,
        total_bytes=transfer.total_bytes,
        percent=transfer.percent,
        rate_bytes_per_s=transfer.rate_bytes_per_s,
        eta_s=transfer.eta_s,
    )


def transfer_from_pb(message: transfer_pb2.Transfer) -> m.Transfer:
    """Numbers as the node says them."""
    return m.Transfer(
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
        percent=finite(message.percent),
        rate_bytes_per_s=finite(message.rate_bytes_per_s),
        eta_s=finite(message.eta_s),
    )


def failure_to_pb(failure: m.Failure) -> model_pb2.Failure:
    """Total."""
    return model_pb2.Failure(reason=failure.reason, message=failure.message)


def failure_from_pb(message: model_pb2.Failure) -> m.Failure:
    """Cut to what is worth keeping; NUL can't be stored."""
    return m.Failure(reason=clean_text(message.reason, 63), message=clean_text(message.message, 2000))


def source_to_pb(source: m.Source) -> model_pb2.ModelSource:
    """Total."""
    if source.kind is m.SourceKind.HUB:
        return model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id=source.location, revision=source.revision))
    if source.kind is m.SourceKind.FOLDER:
        return model_pb2.ModelSource(folder=model_pb2.FolderSource(path=source.location))
    return model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=source.location))


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
        return m.Source(kind=m.SourceKind.GGUF, location=path)
    raise FieldInvalid("model.source", "set one of `hub`, `folder`, `gguf`")


def new_model_from_pb(message: model_pb2.Model, roots: ModelRoots) -> m.NewModel:
    """What RegisterModel reads of a model."""
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
    """Known options only."""
    return checked_load_options(json_format.MessageToDict(message))


def model_to_pb(model: m.Model) -> model_pb2.Model:
    """Total."""
    message = model_pb2.Model(
        id=model.id,
        source=source_to_pb(model.source),
        commit_sha=model.commit_sha,
        quantization=_QUANTIZATIONS[model.quantization],
        state=_MODEL_STATES[model.state],
        failure=failure_to_pb(model.failure) if model.failure else None,
        transfer=transfer_to_pb(model.transfer) if model.transfer else None,
        architecture=architecture_to_pb(model.architecture) if model.architecture else None,
        n_parameters=model.n_parameters,
        weight_bytes=model.weight_bytes,
        parameters_by_dtype=model.parameters_by_dtype,
        files_path=model.files_path,
        tokenizer_digest=model.tokenizer_digest,
        labels=model.labels,
        etag=model.etag,
        create_time=time_to_pb(model.create_time),
        update_time=time_to_pb(model.update_time),
        fidelity=fidelity_to_pb(model.fidelity) if model.fidelity else None,
        store_bytes=model.store_bytes,
        last_used_time=time_to_pb(model.last_used_time) if model.last_used_time else None,
    )
    if model.load_options:
        message.load_options.update(model.load_options)
    return message


def quantization_to_pb(quantization: m.Quantization) -> model_pb2.Quantization.ValueType:
    """Total."""
    return _QUANTIZATIONS[quantization]


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
    """Numbers as the node says them; what is not finite can't be stored."""
    return m.Fidelity(
        reference_dtype=clean_text(message.reference_dtype, 63),
        n_tokens=message.n_tokens,
        layers=tuple(
            m.LayerFidelity(layer=each.layer, cosine=finite(each.cosine), relative_error=finite(each.relative_error))
            for each in message.layers
        ),
    )


def architecture_to_pb(architecture: m.Architecture) -> model_pb2.Architecture:
    """Total."""
    return model_pb2.Architecture(
        model_type=architecture.model_type,
        class_name=architecture.class_name,
        n_layers=architecture.n_layers,
        d_model=architecture.d_model,
        n_heads=architecture.n_heads,
        n_kv_heads=architecture.n_kv_heads,
        d_head=architecture.d_head,
        d_mlp=architecture.d_mlp,
        vocab_size=architecture.vocab_size,
        context_window=architecture.context_window,
        tied_embeddings=architecture.tied_embeddings,
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


def device_from_pb(message: residency_pb2.Device) -> Device:
    """Checked further by the Announcement it is part of."""
    kind = _DEVICE_KIND_FROM.get(message.kind)
    if kind is None:
        raise FieldInvalid("devices.kind", f"of {message.id!r} is missing or unknown")
    return Device(
        id=message.id,
        kind=kind,
        name=message.name,
        capacity_bytes=message.capacity_bytes,
        free_bytes=message.free_bytes,
        total_bytes=message.total_bytes,
        lost_bytes=message.lost_bytes,
        capability=message.capability,
        flash_attention=message.flash_attention,
    )


def device_to_pb(device: Device) -> residency_pb2.Device:
    """Total."""
    return residency_pb2.Device(
        id=device.id,
        kind=_DEVICE_KINDS[device.kind],
        name=device.name,
        capacity_bytes=device.capacity_bytes,
        reserved_bytes=device.reserved_bytes,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        lost_bytes=device.lost_bytes,
        capability=device.capability,
        flash_attention=device.flash_attention,
    )


def node_to_pb(node: Node) -> residency_pb2.Node:
    """Total."""
    return residency_pb2.Node(
        id=node.id,
        address=node.address,
        epoch=node.epoch,
        state=_NODE_STATES[node.state],
        devices=[device_to_pb(device) for device in node.devices],
        version=node.version,
        heartbeat_time=time_to_pb(node.heartbeat_time),
        memory_bytes=node.memory_bytes,
        memory_free_bytes=node.memory_free_bytes,
        runtime_bytes=node.runtime_bytes,
        max_loads=node.max_loads,
        max_residents=node.max_residents,
    )


def residency_state_from_pb(value: int) -> ResidencyState:
    """The states a node may report."""
    state = _RESIDENCY_STATE_FROM.get(value)
    reportable = (
        ResidencyState.LOADING,
        ResidencyState.RESIDENT,
        ResidencyState.UNLOADED,
        ResidencyState.FAILED,
    )
    if state is None or state not in reportable:
        raise FieldInvalid("state", f"report one of {', '.join(reportable)}")
    return state


def residency_to_pb(residency: Residency) -> residency_pb2.Residency:
    """Total."""
    return residency_pb2.Residency(
        id=residency.id,
        model_id=residency.model_id,
        node_id=residency.node_id,
        device_id=residency.device_id,
        state=_RESIDENCY_STATES[residency.state],
        reserved_bytes=residency.reserved_bytes,
        measured_bytes=residency.measured_bytes,
        fence=residency.fence,
        node_epoch=residency.node_epoch,
        n_leases=residency.n_leases,
        reason=residency.reason,
        actor=residency.actor,
        transfer=transfer_to_pb(residency.transfer) if residency.transfer else None,
        failure=failure_to_pb(residency.failure) if residency.failure else None,
        create_time=time_to_pb(residency.create_time),
        update_time=time_to_pb(residency.update_time),
        last_used_time=time_to_pb(residency.last_used_time),
        queue_position=residency.queue_position,
        pinned=residency.pinned,
        holders=residency.holders,
    )


def residency_event_to_pb(event: ResidencyEvent) -> residency_service_pb2.WatchResidenciesResponse:
    """Total."""
    return residency_service_pb2.WatchResidenciesResponse(
        seq=event.seq,
        time=time_to_pb(event.time),
        residency=residency_to_pb(event.residency),
        snapshot=event.snapshot,
    )


def pin_from_pb(message: residency_pb2.Pin) -> Pin:
    """Checked; what is output only is left out."""
    return Pin(
        model_id=message.model_id,
        node_id=message.node_id,
        owner=message.owner,
        reason=message.reason,
        expire_time=_time_from_pb(message.expire_time, field="pin.expire_time")
        if message.HasField("expire_time")
        else None,
    )


def pin_to_pb(pin: Pin) -> residency_pb2.Pin:
    """Total."""
    return residency_pb2.Pin(
        model_id=pin.model_id,
        node_id=pin.node_id,
        owner=pin.owner,
        reason=pin.reason,
        expire_time=time_to_pb(pin.expire_time) if pin.expire_time else None,
        create_time=time_to_pb(pin.create_time) if pin.create_time else None,
    )


def lease_to_pb(lease: Lease) -> residency_pb2.Lease:
    """Total."""
    return residency_pb2.Lease(
        id=lease.id,
        residency_id=lease.residency_id,
        model_id=lease.model_id,
        holder=lease.holder,
        fence=lease.fence,
        ttl_s=lease.ttl_s,
        expire_time=time_to_pb(lease.expire_time),
        node_id=lease.node_id,
        node_address=lease.node_address,
    )


def set_report_from_pb(message: set_pb.ActivationSet, *, node_id: str) -> SetReport:
    """What a node holds; the node is the caller."""
    return SetReport(
        id=message.id,
        node_id=node_id,
        model_id=message.model_id,
        corpus_id=message.corpus_id,
        columns=tuple(message.columns),
        n_rows=message.n_rows,
        size_bytes=message.size_bytes,
        complete=message.complete,
        retention=message.retention,
        path=message.path,
    )


def set_to_pb(held: ActivationSet) -> set_pb.ActivationSet:
    """Total."""
    report = held.report
    return set_pb.ActivationSet(
        id=report.id,
        node_id=report.node_id,
        model_id=report.model_id,
        corpus_id=report.corpus_id,
        columns=report.columns,
        n_rows=report.n_rows,
        size_bytes=report.size_bytes,
        complete=report.complete,
        retention=report.retention,
        path=report.path,
        create_time=time_to_pb(held.create_time),
        update_time=time_to_pb(held.update_time),
    )


def finite(value: float) -> float:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < 1e300 else 0.0


def _time_from_pb(stamp: Timestamp, *, field: str) -> datetime:
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as exc:
        raise FieldInvalid(field, "is no time between the years 1 and 9999") from exc


def clean_text(text: str, max_length: int) -> str:
    """Cut to what is worth keeping; NUL can't be stored."""
    return text.replace("\x00", "")[:max_length]
