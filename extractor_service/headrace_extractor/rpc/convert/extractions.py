"""Converts requests for extractions, and extractions."""

from __future__ import annotations

from headrace.extractor.v1 import extraction_pb2, extraction_service_pb2
from headrace_extractor.extractions.values import Extraction, ReaderStatus
from headrace_extractor.rpc.convert.common import timestamp, transfer_to_pb
from headrace_extractor.rpc.convert.receipts import receipt_to_pb
from headrace_extractor.rpc.convert.recipes import DTYPES, recipe_from_pb, recipe_to_pb
from headrace_extractor.sets.activation_set import Kind
from headrace_extractor.sets.spec import ExtractionSpec, Retention
from headrace_extractor.sets.verification import Verified
from headrace_log.layout import ColumnSpec


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
        n_documents_skipped=value.n_documents_skipped,
        receipt=receipt_to_pb(value.receipt),
    )


def column_to_pb(column: ColumnSpec) -> extraction_service_pb2.Column:
    """One column of a stream's header."""
    return extraction_service_pb2.Column(
        name=column.name,
        dtype=DTYPES[column.dtype],
        width=column.width,
        scale_column=column.scale_column or "",
        shape=column.shape,
    )


def verified_to_pb(verified: Verified) -> extraction_service_pb2.VerifySetResponse:
    """The damaged rows only at the end: they may be many."""
    return extraction_service_pb2.VerifySetResponse(
        n_files=verified.n_files,
        n_files_total=verified.n_files_total,
        size_bytes=verified.size_bytes,
        total_bytes=verified.total_bytes,
        n_damaged=verified.n_damaged,
        damages=[
            extraction_service_pb2.DamagedRows(
                file=each.file,
                column=each.column,
                first_row=each.first_row,
                end_row=each.end_row,
                message=each.message,
            )
            for each in verified.damages
            if verified.done
        ],
        done=verified.done,
    )
