"""Protobuf messages to values and back: pairs of total functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from headrace.common.v1 import dtype_pb2, transfer_pb2
from headrace.extractor.v1 import corpus_service_pb2, extraction_pb2, extraction_service_pb2
from headrace.registry.v1 import model_pb2, node_service_pb2, residency_pb2
from headrace_extractor.corpora.recipe import ONE_DOCUMENT, PACKED, Recipe
from headrace_extractor.corpora.spec import Corpus, CorpusFormat, CorpusSpec, TextSplit
from headrace_extractor.errors import Failure, FieldInvalid
from headrace_extractor.extractions.values import Extraction, ReaderStatus
from headrace_extractor.meters import Transfer
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
from headrace_extractor.rpc.convert.receipts import receipt_to_pb
from headrace_extractor.rpc.convert.recipes import (
    long_documents_from_pb,
    long_documents_to_pb,
    window_from_pb,
    window_to_pb,
)
from headrace_extractor.sets.activation_set import Kind
from headrace_extractor.sets.spec import ExtractionSpec, Retention
from headrace_log.layout import ColumnSpec, Dtype

_DTYPES = {
    Dtype.FLOAT32: dtype_pb2.DTYPE_FLOAT32,
    Dtype.FLOAT16: dtype_pb2.DTYPE_FLOAT16,
    Dtype.BFLOAT16: dtype_pb2.DTYPE_BFLOAT16,
    Dtype.INT32: dtype_pb2.DTYPE_INT32,
    Dtype.INT8: dtype_pb2.DTYPE_INT8,
    Dtype.FLOAT8_E4M3: dtype_pb2.DTYPE_FLOAT8_E4M3,
}
_DTYPES_BACK = {value: key for key, value in _DTYPES.items()} | {dtype_pb2.DTYPE_UNSPECIFIED: Dtype.FLOAT32}
_FORMATS = {
    corpus_service_pb2.CORPUS_FORMAT_UNSPECIFIED: None,
    corpus_service_pb2.CORPUS_FORMAT_TXT: CorpusFormat.TXT,
    corpus_service_pb2.CORPUS_FORMAT_JSONL: CorpusFormat.JSONL,
    corpus_service_pb2.CORPUS_FORMAT_CSV: CorpusFormat.CSV,
    corpus_service_pb2.CORPUS_FORMAT_PARQUET: CorpusFormat.PARQUET,
    corpus_service_pb2.CORPUS_FORMAT_TOKEN_IDS: CorpusFormat.TOKEN_IDS,
}
_SPLITS = {
    corpus_service_pb2.TEXT_SPLIT_UNSPECIFIED: TextSplit.BLANK_LINES,
    corpus_service_pb2.TEXT_SPLIT_BLANK_LINES: TextSplit.BLANK_LINES,
    corpus_service_pb2.TEXT_SPLIT_LINES: TextSplit.LINES,
    corpus_service_pb2.TEXT_SPLIT_NONE: TextSplit.NONE,
    corpus_service_pb2.TEXT_SPLIT_FORM_FEEDS: TextSplit.FORM_FEEDS,
}
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
    node_service_pb2.BUILD_KIND_QUANTIZE: BuildKind.QUANTIZE,
}
_HOLD = (
    residency_pb2.RESIDENCY_STATE_LOADING,
    residency_pb2.RESIDENCY_STATE_RESIDENT,
    residency_pb2.RESIDENCY_STATE_DRAINING,
)


# -- recipe and spec --------------------------------------------------------------------------------------------------


def recipe_from_pb(message: extraction_pb2.Recipe) -> Recipe:
    """Zero and unspecified take the contract's defaults; raises FieldInvalid."""
    defaults = Recipe()
    if message.storage_dtype not in _DTYPES_BACK:
        raise FieldInvalid("spec.recipe.storage_dtype is unknown.", field="spec.recipe.storage_dtype")
    return Recipe(
        context_size=message.context_size or defaults.context_size,
        packing=ONE_DOCUMENT if message.packing == extraction_pb2.PACKING_ONE_DOCUMENT else PACKED,
        attend_across_documents=message.attend_across_documents,
        bos="none" if message.bos == extraction_pb2.BOS_POLICY_NONE else "document",
        eos="document" if message.eos == extraction_pb2.EOS_POLICY_DOCUMENT else "none",
        drop_special_tokens=message.drop_special_tokens,
        drop_first_positions=message.drop_first_positions,
        batch_size=message.batch_size or defaults.batch_size,
        storage_dtype=str(_DTYPES_BACK[message.storage_dtype]),
        long_documents=long_documents_from_pb(message.long_documents),
        window=window_from_pb(message),
        chat_template=message.chat_template,
    )


def recipe_to_pb(recipe: Recipe) -> extraction_pb2.Recipe:
    """Every field filled in."""
    one = recipe.packing == ONE_DOCUMENT
    return extraction_pb2.Recipe(
        context_size=recipe.context_size,
        packing=extraction_pb2.PACKING_ONE_DOCUMENT if one else extraction_pb2.PACKING_PACKED,
        attend_across_documents=recipe.attend_across_documents,
        bos=extraction_pb2.BOS_POLICY_NONE if recipe.bos == "none" else extraction_pb2.BOS_POLICY_DOCUMENT,
        eos=extraction_pb2.EOS_POLICY_DOCUMENT if recipe.eos == "document" else extraction_pb2.EOS_POLICY_NONE,
        drop_special_tokens=recipe.drop_special_tokens,
        drop_first_positions=recipe.drop_first_positions,
        batch_size=recipe.batch_size,
        storage_dtype=_DTYPES[Dtype(recipe.storage_dtype)],
        long_documents=long_documents_to_pb(recipe.long_documents),
        window=window_to_pb(recipe.window),
        chat_template=recipe.chat_template,
    )


def retention_from_pb(message: extraction_pb2.Retention) -> Retention:
    """Zero and unspecified take the contract's defaults."""
    defaults = Retention()
    return Retention(
        kind=Kind.WINDOW if message.kind == extraction_pb2.RETENTION_KIND_WINDOW else Kind.RETAIN,
        window_bytes=message.window_bytes or defaults.window_bytes,
        reader_grace_s=message.reader_grace_s or defaults.reader_grace_s,
    )


def retention_to_pb(retention: Retention) -> extraction_pb2.Retention:
    """Every field filled in."""
    return extraction_pb2.Retention(
        kind=extraction_pb2.RetentionKind.Value(f"RETENTION_KIND_{retention.kind.upper()}"),
        window_bytes=retention.window_bytes,
        reader_grace_s=retention.reader_grace_s,
    )


def spec_from_pb(message: extraction_pb2.ExtractionSpec) -> ExtractionSpec:
    """Raises FieldInvalid."""
    return ExtractionSpec(
        model_id=message.model_id,
        corpus_id=message.corpus_id,
        hookpoints=tuple(message.hookpoints),
        recipe=recipe_from_pb(message.recipe),
        retention=retention_from_pb(message.retention),
        max_rows=message.max_rows,
        allow_non_finite=message.allow_non_finite,
    )


def spec_to_pb(spec: ExtractionSpec) -> extraction_pb2.ExtractionSpec:
    """Inverse of `spec_from_pb`."""
    return extraction_pb2.ExtractionSpec(
        model_id=spec.model_id,
        corpus_id=spec.corpus_id,
        hookpoints=spec.hookpoints,
        recipe=recipe_to_pb(spec.recipe),
        retention=retention_to_pb(spec.retention),
        max_rows=spec.max_rows,
        allow_non_finite=spec.allow_non_finite,
    )


# -- extraction -------------------------------------------------------------------------------------------------------


def reader_to_pb(status: ReaderStatus) -> extraction_pb2.ReaderStatus:
    """One attached reader."""
    return extraction_pb2.ReaderStatus(reader=status.reader, next_row=status.next_row)


def extraction_to_pb(value: Extraction) -> extraction_pb2.Extraction:
    """An extraction at one moment."""
    failure = value.failure
    return extraction_pb2.Extraction(
        id=value.id,
        spec=spec_to_pb(value.spec),
        set_id=value.set_id,
        state=extraction_pb2.ExtractionState.Value(f"EXTRACTION_STATE_{value.state}"),
        failure=extraction_pb2.ExtractionFailure(
            reason=failure.reason, message=failure.message, metadata=failure.metadata
        )
        if failure
        else None,
        n_rows=value.n_rows,
        n_rows_expected=value.n_rows_expected,
        n_rows_exact=value.n_rows_exact,
        n_rows_computed=value.n_rows_computed,
        rows_per_s=value.rows_per_s,
        size_bytes=value.size_bytes,
        eta_s=value.eta_s,
        transfer=transfer_to_pb(value.transfer),
        queue_position=value.queue_position,
        waiting_for=[reader_to_pb(reader) for reader in value.waiting_for],
        readers=[reader_to_pb(reader) for reader in value.readers],
        path=value.path,
        cached=value.cached,
        create_time=timestamp(value.create_time),
        update_time=timestamp(value.update_time),
        n_non_finite=value.n_non_finite,
        receipt=receipt_to_pb(value.receipt),
    )


def column_to_pb(column: ColumnSpec) -> extraction_service_pb2.Column:
    """One column of a stream's header."""
    return extraction_service_pb2.Column(
        name=column.name,
        dtype=_DTYPES[column.dtype],
        width=column.width,
        scale_column=column.scale_column or "",
        shape=column.shape,
    )


# -- corpora ----------------------------------------------------------------------------------------------------------


def corpus_spec_from_pb(message: corpus_service_pb2.CorpusSpec) -> CorpusSpec:
    """Raises FieldInvalid."""
    if message.format not in _FORMATS or message.text_split not in _SPLITS:
        raise FieldInvalid("spec.format or spec.text_split is a value this version does not know.", field="spec.format")
    return CorpusSpec(
        id=message.id,
        format=_FORMATS[message.format],
        text_column=message.text_column or "text",
        text_split=_SPLITS[message.text_split],
        file_name=message.file_name,
        chat=message.chat,
    )


def corpus_to_pb(corpus: Corpus) -> corpus_service_pb2.Corpus:
    """One corpus."""
    return corpus_service_pb2.Corpus(
        id=corpus.id,
        digest=corpus.digest,
        n_documents=corpus.n_documents,
        size_bytes=corpus.size_bytes,
        tokenized=corpus.tokenized,
        origin=corpus.origin,
        create_time=timestamp(corpus.create_time),
        chat=corpus.chat,
    )


# -- what the registry says and hears ----------------------------------------------------------------------------------


def model_from_pb(message: model_pb2.Model) -> ModelInfo:
    """What an extractor needs of a model."""
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
    )


def desired_from_pb(message: node_service_pb2.WatchAssignmentsResponse) -> DesiredState:
    """All a node shall hold and make."""
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
    """What quantization changed, as a runner told it."""
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
    return model_pb2.Failure(reason=failure.reason, message=failure.message) if failure else None


def transfer_to_pb(transfer: Transfer | None) -> transfer_pb2.Transfer | None:
    """How far a transfer is."""
    if transfer is None:
        return None
    return transfer_pb2.Transfer(
        done_bytes=transfer.done_bytes,
        total_bytes=transfer.total_bytes,
        percent=transfer.percent,
        rate_bytes_per_s=transfer.rate_bytes_per_s,
        eta_s=transfer.eta_s,
    )


def transfer_from_pb(message: transfer_pb2.Transfer) -> Transfer:
    """Inverse of `transfer_to_pb`."""
    return Transfer(
        done_bytes=message.done_bytes, total_bytes=message.total_bytes, rate_bytes_per_s=message.rate_bytes_per_s
    )


def timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970 as a Timestamp."""
    result = Timestamp()
    result.FromNanoseconds(int(seconds * 1e9))
    return result


def _source(source: model_pb2.ModelSource) -> str:
    """What names the weights; a local file's content is in `commit_sha`, its path is not part of it."""
    kind = source.WhichOneof("source") or "unknown"
    return f"hub:{source.hub.repo_id}" if kind == "hub" else kind


def _options(struct: struct_pb2.Struct) -> dict[str, object]:
    return dict(MessageToDict(struct))
