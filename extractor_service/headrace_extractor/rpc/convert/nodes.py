"""Converts the messages between this node and the registry: models, devices, assignments, reports and leases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.json_format import MessageToDict

from headrace.registry.v1 import model_pb2, node_service_pb2, residency_pb2
from headrace_extractor.errors import Failure
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.values import (
    Assignment,
    Build,
    BuildKind,
    DesiredState,
    Device,
    Lease,
    ResidencyReport,
    Validation,
    ValidationReport,
)
from headrace_extractor.rpc.convert.common import transfer_to_pb
from headrace_models.folder import FileStamp

_QUANTIZATIONS = {
    model_pb2.QUANTIZATION_UNSPECIFIED: "none",
    model_pb2.QUANTIZATION_NONE: "none",
    model_pb2.QUANTIZATION_INT8: "int8",
    model_pb2.QUANTIZATION_INT4: "int4",
    model_pb2.QUANTIZATION_INT2: "int2",
}


_DEVICE_KINDS = {
    "cpu": residency_pb2.DEVICE_KIND_CPU,
    "cuda": residency_pb2.DEVICE_KIND_CUDA,
    "mps": residency_pb2.DEVICE_KIND_MPS,
}


_BUILD_KINDS: dict[int, BuildKind] = {
    node_service_pb2.BUILD_KIND_CONVERT_GGUF: BuildKind.CONVERT_GGUF,
    node_service_pb2.BUILD_KIND_CONVERT_PICKLED: BuildKind.CONVERT_PICKLED,
    node_service_pb2.BUILD_KIND_CONVERT_TOKENIZER: BuildKind.CONVERT_TOKENIZER,
    node_service_pb2.BUILD_KIND_QUANTIZE: BuildKind.QUANTIZE,
}


_HOLD = (
    residency_pb2.RESIDENCY_STATE_LOADING,
    residency_pb2.RESIDENCY_STATE_RESIDENT,
    residency_pb2.RESIDENCY_STATE_DRAINING,
)


def model_from_pb(message: model_pb2.Model) -> ModelInfo:
    """Returns the fields of a registered model that the extractor needs."""
    architecture = message.architecture
    return ModelInfo(
        id=message.id,
        source=_source(message.source),
        commit_sha=message.commit_sha,
        quantization=_QUANTIZATIONS[message.quantization],
        load_options=_options(message.load_options),
        ready=message.state == model_pb2.MODEL_STATE_READY,
        model_type=architecture.model_type,
        n_layers=architecture.n_layers,
        d_model=architecture.d_model,
        context_window=architecture.context_window,
        weight_bytes=message.weight_bytes,
        files_path=message.files_path,
        tokenizer_digest=message.tokenizer_digest,
        gguf_path=message.source.gguf.path,
        files=tuple(
            FileStamp(
                name=each.name,
                size_bytes=each.size_bytes,
                mtime_ns=each.mtime_ns,
                inode=each.inode,
                sha256=each.sha256,
            )
            for each in message.files
        ),
    )


def desired_from_pb(message: node_service_pb2.WatchAssignmentsResponse) -> DesiredState:
    """Returns all assignments, builds and validations of this node."""
    return DesiredState(
        assignments=tuple(
            Assignment(
                residency_id=a.residency.id,
                fence=a.residency.fence,
                device_id=a.residency.device_id,
                hold=a.residency.state in _HOLD,
                state=residency_pb2.ResidencyState.Name(a.residency.state).removeprefix("RESIDENCY_STATE_"),
                model=model_from_pb(a.model),
                reserved_bytes=a.residency.reserved_bytes,
            )
            for a in message.assignments
        ),
        builds=tuple(
            Build(
                kind=_BUILD_KINDS.get(b.kind),
                model=model_from_pb(b.model),
                target_path=b.target_path,
                source_path=b.source_path,
            )
            for b in message.builds
        ),
        validations=tuple(
            Validation(
                attempt_id=v.attempt_id,
                model=model_from_pb(v.model),
                device_id=v.device_id,
                load_options=_options(v.load_options),
            )
            for v in message.validations
        ),
    )


def fidelity_to_pb(fidelity: Mapping[str, Any] | None) -> model_pb2.Fidelity | None:
    """Returns how much quantization changed each layer; None if that was not measured."""
    if fidelity is None:
        return None
    layers = [model_pb2.LayerFidelity(**layer) for layer in fidelity["layers"]]
    return model_pb2.Fidelity(reference_dtype=fidelity["reference_dtype"], n_tokens=fidelity["n_tokens"], layers=layers)


def validation_to_pb(node_id: str, epoch: int, report: ValidationReport) -> node_service_pb2.ReportValidationRequest:
    """How a validation stands."""
    return node_service_pb2.ReportValidationRequest(
        node_id=node_id,
        epoch=epoch,
        attempt_id=report.attempt_id,
        steps=[
            model_pb2.ValidationStep(
                name=step.name,
                state=model_pb2.ValidationStepState.Value(f"VALIDATION_STEP_STATE_{step.state}"),
                message=step.message,
                seconds=step.seconds,
                figures=step.figures,
            )
            for step in report.steps
        ],
        done=report.done,
        failure=failure_to_pb(report.failure),
        versions=report.versions,
    )


def report_to_pb(node_id: str, epoch: int, report: ResidencyReport) -> node_service_pb2.ReportResidencyRequest:
    """How a residency stands."""
    return node_service_pb2.ReportResidencyRequest(
        node_id=node_id,
        epoch=epoch,
        residency_id=report.residency_id,
        fence=report.fence,
        state=residency_pb2.ResidencyState.Value(f"RESIDENCY_STATE_{report.state}"),
        transfer=transfer_to_pb(report.transfer),
        measured_bytes=report.measured_bytes,
        failure=failure_to_pb(report.failure),
        lost_bytes=report.lost_bytes,
        versions=report.versions,
        log_tail=report.log_tail,
    )


def device_to_pb(device: Device) -> residency_pb2.Device:
    """One device."""
    return residency_pb2.Device(
        id=device.id,
        kind=_DEVICE_KINDS[device.kind],
        name=device.name,
        capacity_bytes=device.capacity_bytes,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        lost_bytes=device.lost_bytes,
        capability=device.capability,
        flash_attention=device.flash_attention,
    )


def lease_from_pb(message: residency_pb2.Lease) -> Lease:
    """A granted lease."""
    return Lease(id=message.id, fence=message.fence, residency_id=message.residency_id, ttl_s=message.ttl_s)


def failure_to_pb(failure: Failure | None) -> model_pb2.Failure | None:
    """Why work ended badly."""
    if failure is None:
        return None
    return model_pb2.Failure(reason=failure.reason, message=failure.message, interrupted=failure.interrupted)


def _source(source: model_pb2.ModelSource) -> str:
    """Names the weights for a set's identity. A local path is no part of it: `commit_sha` says what its files hold."""
    kind = source.WhichOneof("source") or "unknown"
    return f"hub:{source.hub.repo_id}" if kind == "hub" else kind


def _options(struct: struct_pb2.Struct) -> dict[str, object]:
    return dict(MessageToDict(struct))
