"""Between messages about extractions and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.extractor.v1 import extraction_pb2 as extraction_pb
from headrace.extractor.v1 import extraction_service_pb2 as extractions_pb
from headrace_client import values as v
from headrace_client.errors import InvalidArgument
from headrace_client.rpc.convert.common import failure_from_pb, time_from_pb, transfer_from_pb
from headrace_client.rpc.convert.enums import state_of
from headrace_client.rpc.convert.receipts import receipt_from_pb
from headrace_client.rpc.convert.recipes import recipe_from_pb, recipe_to_pb


def retention_from_pb(pb: extraction_pb.Retention) -> v.Retention:
    """Reads a retention, defaults filled in."""
    if pb.kind != extraction_pb.RETENTION_KIND_WINDOW:
        return v.Retain()
    default = v.Window()
    return v.Window(
        window_bytes=pb.window_bytes or default.window_bytes, reader_grace_s=pb.reader_grace_s or default.reader_grace_s
    )


def retention_to_pb(retention: v.Retention) -> extraction_pb.Retention:
    """Builds a retention."""
    if isinstance(retention, v.Retain):
        return extraction_pb.Retention(kind=extraction_pb.RETENTION_KIND_RETAIN)
    return extraction_pb.Retention(
        kind=extraction_pb.RETENTION_KIND_WINDOW,
        window_bytes=retention.window_bytes,
        reader_grace_s=retention.reader_grace_s,
    )


def spec_to_pb(
    *,
    model_id: str,
    corpus_id: str,
    hookpoints: Sequence[str],
    recipe: v.Recipe,
    retention: v.Retention,
    max_rows: int,
    allow_non_finite: bool,
) -> extraction_pb.ExtractionSpec:
    """Builds the spec of an extraction."""
    try:
        return extraction_pb.ExtractionSpec(
            model_id=model_id,
            corpus_id=corpus_id,
            hookpoints=list(hookpoints),
            recipe=recipe_to_pb(recipe),
            retention=retention_to_pb(retention),
            max_rows=max_rows,
            allow_non_finite=allow_non_finite,
        )
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"the extraction can't be put on the wire: {exc}") from exc


def extraction_from_pb(pb: extraction_pb.Extraction, *, node_id: str = "") -> v.Extraction:
    """Reads an extraction of a node."""
    return v.Extraction(
        id=pb.id,
        set_id=pb.set_id,
        model_id=pb.spec.model_id,
        corpus_id=pb.spec.corpus_id,
        hookpoints=tuple(pb.spec.hookpoints),
        recipe=recipe_from_pb(pb.spec.recipe),
        retention=retention_from_pb(pb.spec.retention),
        max_rows=pb.spec.max_rows,
        state=extraction_state_from_pb(pb.state),
        failure=failure_from_pb(pb),
        n_rows=pb.n_rows,
        n_rows_expected=pb.n_rows_expected or None,
        n_rows_exact=pb.n_rows_exact,
        n_rows_computed=pb.n_rows_computed,
        rows_per_s=pb.rows_per_s,
        size_bytes=pb.size_bytes,
        eta_s=pb.eta_s if pb.eta_s >= 0 and pb.n_rows_expected else None,
        transfer=transfer_from_pb(pb),
        queue_position=pb.queue_position,
        waiting_for=_readers_from_pb(pb.waiting_for),
        readers=_readers_from_pb(pb.readers),
        path=pb.path,
        cached=pb.cached,
        n_non_finite=pb.n_non_finite,
        n_documents_skipped=pb.n_documents_skipped,
        receipt=receipt_from_pb(pb),
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        node_id=node_id,
    )


def extraction_state_from_pb(number: int) -> v.ExtractionState:
    """Reads the state of an extraction."""
    return state_of(extraction_pb.ExtractionState, "EXTRACTION_STATE_", number, v.ExtractionState)


def _readers_from_pb(readers: Iterable[extraction_pb.ReaderStatus]) -> tuple[v.ReaderStatus, ...]:
    return tuple(v.ReaderStatus(reader=reader.reader, next_row=reader.next_row) for reader in readers)


def extraction_event_from_pb(
    pb: extractions_pb.WatchExtractionResponse, *, node_id: str = ""
) -> v.ExtractionEvent | None:
    """Reads an event of a node; None for a heartbeat."""
    if pb.heartbeat:
        return None
    extraction = extraction_from_pb(pb.extraction, node_id=node_id)
    return v.ExtractionEvent(seq=pb.seq, extraction=extraction, snapshot=pb.snapshot)


def estimate_from_pb(pb: extractions_pb.EstimateExtractionResponse) -> v.Estimate:
    """Reads an estimate."""
    return v.Estimate(
        n_rows=pb.n_rows,
        size_bytes=pb.size_bytes,
        seconds=pb.seconds if pb.seconds >= 0 else None,
        n_tokens=pb.n_tokens,
        n_rows_cached=pb.n_rows_cached,
        new_bytes=pb.new_bytes if pb.new_bytes >= 0 else None,
        available_bytes=pb.available_bytes if pb.available_bytes >= 0 else None,
    )


def hookpoint_from_pb(pb: extractions_pb.Hookpoint) -> v.Hookpoint:
    """Reads a hookpoint."""
    return v.Hookpoint(
        name=pb.name,
        width=pb.width,
        unavailable=pb.unavailable,
        shape=tuple(pb.shape) or (pb.width,),
        module=pb.module,
    )
