"""Messages to values and back: total functions, `x_from_pb` and `x_to_pb`. Only `_transport` knows stubs too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import dtype_pb2, transfer_pb2
from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace.extractor.v1 import extraction_pb2 as extraction_pb
from headrace.extractor.v1 import extraction_service_pb2 as extractions_pb
from headrace.registry.v1 import model_pb2 as model_pb
from headrace.registry.v1 import model_service_pb2 as models_pb
from headrace.registry.v1 import residency_pb2 as residency_pb
from headrace.registry.v1 import residency_service_pb2 as residencies_pb

from headrace_client import values as v
from headrace_client._convert_receipt import receipt_from_pb
from headrace_client._convert_recipe import (
    long_documents_from_pb,
    long_documents_to_pb,
    window_from_pb,
    window_to_pb,
)
from headrace_client.errors import InvalidArgument
from headrace_client.fidelity import Fidelity, LayerFidelity

UPLOAD_PIECE_BYTES = 512 * 1024  # The server takes at most 1 MiB in one message.

_E = TypeVar("_E", bound=StrEnum)


class _EnumNames(Protocol):
    def Name(self, number: Any) -> str: ...  # noqa: N802 - protobuf's spelling.


def _name(enum: _EnumNames, number: int) -> str:
    """The name of an enum value without its type's prefix; empty for one that this client does not know."""
    try:
        return enum.Name(number)
    except ValueError:
        return ""


def _state(enum: _EnumNames, prefix: str, number: int, kind: type[_E]) -> _E:
    name = _name(enum, number).removeprefix(prefix)
    return kind(name) if name in kind.__members__ else kind("UNKNOWN")


def _choice(enum: _EnumNames, prefix: str, number: int, kind: type[_E], default: _E) -> _E:
    name = _name(enum, number).removeprefix(prefix)
    return kind[name] if name in kind.__members__ else default


def time_from_pb(message: Any, field: str) -> datetime | None:
    """A field that holds a time."""
    if not message.HasField(field):
        return None
    stamp: Timestamp = getattr(message, field)
    return stamp.ToDatetime(tzinfo=UTC)


def _transfer(message: Any) -> v.Transfer | None:
    if not message.HasField("transfer"):
        return None
    pb: transfer_pb2.Transfer = message.transfer
    return v.Transfer(
        done_bytes=pb.done_bytes,
        total_bytes=pb.total_bytes or None,
        percent=pb.percent if pb.total_bytes else None,
        rate_bytes_per_s=pb.rate_bytes_per_s or None,
        eta_s=pb.eta_s if pb.eta_s >= 0 and pb.total_bytes else None,
    )


def failure_from_pb(message: Any) -> v.Failure | None:
    """The field `failure`."""
    if not message.HasField("failure"):
        return None
    pb = message.failure
    return v.Failure(reason=pb.reason, message=pb.message, metadata=dict(getattr(pb, "metadata", {})))


# Models


def model_from_pb(pb: model_pb.Model) -> v.Model:
    """Reads a model."""
    return v.Model(
        id=pb.id,
        source=_source_from_pb(pb.source),
        state=_state(model_pb.ModelState, "MODEL_STATE_", pb.state, v.ModelState),
        commit_sha=pb.commit_sha,
        quantization=quantization_from_pb(pb.quantization),
        load_options=MessageToDict(pb.load_options),
        labels=dict(pb.labels),
        failure=failure_from_pb(pb),
        transfer=_transfer(pb),
        architecture=_architecture_from_pb(pb.architecture) if pb.HasField("architecture") else None,
        n_parameters=pb.n_parameters,
        weight_bytes=pb.weight_bytes,
        parameters_by_dtype=dict(pb.parameters_by_dtype),
        files_path=pb.files_path,
        tokenizer_digest=pb.tokenizer_digest,
        etag=pb.etag,
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        fidelity=_fidelity_from_pb(pb.fidelity) if pb.HasField("fidelity") else None,
        store_bytes=pb.store_bytes,
        last_used_time=time_from_pb(pb, "last_used_time"),
    )


def struct_of(options: Mapping[str, Any]) -> Struct:
    """A JSON object."""
    struct = Struct()
    struct.update(dict(options))
    return struct


def quantization_from_pb(number: int) -> v.Quantization:
    """A quantization; NONE for one that this client does not know."""
    return _choice(model_pb.Quantization, "QUANTIZATION_", number, v.Quantization, v.Quantization.NONE)


def _fidelity_from_pb(pb: model_pb.Fidelity) -> Fidelity:
    layers = tuple(
        LayerFidelity(layer=each.layer, cosine=each.cosine, relative_error=each.relative_error) for each in pb.layers
    )
    return Fidelity(reference_dtype=pb.reference_dtype, n_tokens=pb.n_tokens, layers=layers)


def _source_from_pb(pb: model_pb.ModelSource) -> v.ModelSource:
    kind = pb.WhichOneof("source")
    if kind == "hub":
        return v.ModelSource(kind="hub", location=pb.hub.repo_id, revision=pb.hub.revision)
    return v.ModelSource(kind=kind or "unknown", location=getattr(pb, kind).path if kind else "")


def _architecture_from_pb(pb: model_pb.Architecture) -> v.Architecture:
    return v.Architecture(
        **{field.name: getattr(pb, field.name) for field in pb.DESCRIPTOR.fields if _known(field.name)}
    )


def _known(field: str) -> bool:
    return field in v.Architecture.__dataclass_fields__


def model_to_pb(
    *,
    source: v.ModelSource,
    model_id: str,
    quantization: v.Quantization,
    load_options: dict[str, Any],
    labels: dict[str, str],
) -> model_pb.Model:
    """Builds what RegisterModel reads of a model."""
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


# Nodes, residencies, sets


def node_from_pb(pb: residency_pb.Node) -> v.Node:
    """Reads a node."""
    return v.Node(
        id=pb.id,
        address=pb.address,
        epoch=pb.epoch,
        state=_state(residency_pb.NodeState, "NODE_STATE_", pb.state, v.NodeState),
        devices=tuple(_device_from_pb(device) for device in pb.devices),
        version=pb.version,
        heartbeat_time=time_from_pb(pb, "heartbeat_time"),
        memory_bytes=pb.memory_bytes,
        memory_free_bytes=pb.memory_free_bytes,
        runtime_bytes=pb.runtime_bytes,
        max_loads=pb.max_loads,
        max_residents=pb.max_residents,
    )


def _device_from_pb(pb: residency_pb.Device) -> v.Device:
    return v.Device(
        id=pb.id,
        kind=_name(residency_pb.DeviceKind, pb.kind).removeprefix("DEVICE_KIND_").lower(),
        name=pb.name,
        capacity_bytes=pb.capacity_bytes,
        reserved_bytes=pb.reserved_bytes,
        free_bytes=pb.free_bytes,
        total_bytes=pb.total_bytes,
        lost_bytes=pb.lost_bytes,
        capability=pb.capability,
        flash_attention=pb.flash_attention,
    )


def residency_from_pb(pb: residency_pb.Residency) -> v.Residency:
    """Reads a residency."""
    return v.Residency(
        id=pb.id,
        model_id=pb.model_id,
        node_id=pb.node_id,
        device_id=pb.device_id,
        state=_state(residency_pb.ResidencyState, "RESIDENCY_STATE_", pb.state, v.ResidencyState),
        reserved_bytes=pb.reserved_bytes,
        measured_bytes=pb.measured_bytes,
        n_leases=pb.n_leases,
        reason=pb.reason,
        actor=pb.actor,
        transfer=_transfer(pb),
        failure=failure_from_pb(pb),
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        last_used_time=time_from_pb(pb, "last_used_time"),
        queue_position=pb.queue_position,
        pinned=pb.pinned,
        holders=tuple(pb.holders),
    )


def residency_event_from_pb(pb: residencies_pb.WatchResidenciesResponse) -> v.ResidencyEvent | None:
    """Reads an event; None for a heartbeat."""
    if pb.heartbeat:
        return None
    return v.ResidencyEvent(
        seq=pb.seq, residency=residency_from_pb(pb.residency), snapshot=pb.snapshot, time=time_from_pb(pb, "time")
    )


def pin_from_pb(pb: residency_pb.Pin) -> v.Pin:
    """Reads a pin."""
    return v.Pin(
        model_id=pb.model_id,
        owner=pb.owner,
        node_id=pb.node_id,
        reason=pb.reason,
        expire_time=time_from_pb(pb, "expire_time"),
        create_time=time_from_pb(pb, "create_time"),
    )


def pin_to_pb(pin: v.Pin) -> residency_pb.Pin:
    """Builds what PinModel reads of a pin. A time without a zone is local."""
    pb = residency_pb.Pin(model_id=pin.model_id, owner=pin.owner, node_id=pin.node_id, reason=pin.reason)
    if pin.expire_time is not None:
        pb.expire_time.FromDatetime(pin.expire_time.astimezone(UTC))
    return pb


# Corpora


def corpus_from_pb(pb: corpora_pb.Corpus) -> v.Corpus:
    """Reads a corpus."""
    return v.Corpus(
        id=pb.id,
        digest=pb.digest,
        n_documents=pb.n_documents,
        size_bytes=pb.size_bytes,
        tokenized=pb.tokenized,
        origin=pb.origin,
        create_time=time_from_pb(pb, "create_time"),
        chat=pb.chat,
    )


def corpus_spec_to_pb(
    *,
    corpus_id: str,
    file_format: str = "",
    text_column: str = "",
    text_split: str = "",
    file_name: str = "",
    chat: bool = False,
) -> corpora_pb.CorpusSpec:
    """Builds a CorpusSpec; formats and splits are the contract's names in lower case, empty for the server's choice."""
    return corpora_pb.CorpusSpec(
        id=corpus_id,
        format=_value(corpora_pb.CorpusFormat, "CORPUS_FORMAT_", file_format, "format"),
        text_column=text_column,
        text_split=_value(corpora_pb.TextSplit, "TEXT_SPLIT_", text_split, "text_split"),
        file_name=file_name,
        chat=chat,
    )


def _value(enum: Any, prefix: str, name: str, field: str) -> Any:
    """The number of an enum value; unspecified for an empty name."""
    if not name:
        return 0
    known = [key.removeprefix(prefix).lower() for key, number in enum.items() if number]
    if name.lower() not in known:
        raise InvalidArgument(f"{field} is one of {', '.join(known)}, not {name!r}", fields={field: name})
    return enum.Value(prefix + name.upper())


def upload_parts(spec: corpora_pb.CorpusSpec, content: Iterable[bytes]) -> Iterator[corpora_pb.UploadCorpusRequest]:
    """Yields the messages of an upload: the spec, then the content in pieces of bounded size."""
    yield corpora_pb.UploadCorpusRequest(spec=spec)
    for block in content:
        for at in range(0, len(block), UPLOAD_PIECE_BYTES):
            yield corpora_pb.UploadCorpusRequest(content=block[at : at + UPLOAD_PIECE_BYTES])


def token_ids_to_pb(documents: Iterable[Sequence[int]]) -> corpora_pb.TokenIdsSource:
    """Builds a source of token ids."""
    try:
        return corpora_pb.TokenIdsSource(
            documents=[corpora_pb.TokenDocument(token_ids=[int(token) for token in document]) for document in documents]
        )
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"token ids are integers of 32 bits: {exc}") from exc


def path_to_pb(path: str) -> corpora_pb.PathSource:
    """Builds a source on the node's disk."""
    return corpora_pb.PathSource(path=path)


# Extractions


def recipe_from_pb(pb: extraction_pb.Recipe) -> v.Recipe:
    """Reads a recipe, defaults filled in."""
    return v.Recipe(
        context_size=pb.context_size or 256,
        packing=_choice(extraction_pb.Packing, "PACKING_", pb.packing, v.Packing, v.Packing.PACKED),
        attend_across_documents=pb.attend_across_documents,
        bos=_choice(extraction_pb.BosPolicy, "BOS_POLICY_", pb.bos, v.TokenPolicy, v.TokenPolicy.DOCUMENT),
        eos=_choice(extraction_pb.EosPolicy, "EOS_POLICY_", pb.eos, v.TokenPolicy, v.TokenPolicy.NONE),
        drop_special_tokens=pb.drop_special_tokens,
        drop_first_positions=pb.drop_first_positions,
        batch_size=pb.batch_size or 4,
        storage_dtype=_dtype(pb.storage_dtype, v.Dtype.FLOAT32),
        long_documents=long_documents_from_pb(pb),
        window=window_from_pb(pb),
        chat_template=pb.chat_template,
    )


def recipe_to_pb(recipe: v.Recipe) -> extraction_pb.Recipe:
    """Builds a recipe."""
    return extraction_pb.Recipe(
        context_size=recipe.context_size,
        packing=extraction_pb.Packing.Value(f"PACKING_{recipe.packing.name}"),
        attend_across_documents=recipe.attend_across_documents,
        bos=extraction_pb.BosPolicy.Value(f"BOS_POLICY_{recipe.bos.name}"),
        eos=extraction_pb.EosPolicy.Value(f"EOS_POLICY_{recipe.eos.name}"),
        drop_special_tokens=recipe.drop_special_tokens,
        drop_first_positions=recipe.drop_first_positions,
        batch_size=recipe.batch_size,
        storage_dtype=dtype_pb2.Dtype.Value(f"DTYPE_{recipe.storage_dtype.name}"),
        long_documents=long_documents_to_pb(recipe.long_documents),
        window=window_to_pb(recipe.window),
        chat_template=recipe.chat_template,
    )


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


def extraction_from_pb(pb: extraction_pb.Extraction) -> v.Extraction:
    """Reads an extraction."""
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
        transfer=_transfer(pb),
        queue_position=pb.queue_position,
        waiting_for=_readers_from_pb(pb.waiting_for),
        readers=_readers_from_pb(pb.readers),
        path=pb.path,
        cached=pb.cached,
        n_non_finite=pb.n_non_finite,
        receipt=receipt_from_pb(pb),
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
    )


def extraction_state_from_pb(number: int) -> v.ExtractionState:
    """Reads the state of an extraction."""
    return _state(extraction_pb.ExtractionState, "EXTRACTION_STATE_", number, v.ExtractionState)


def _readers_from_pb(readers: Iterable[extraction_pb.ReaderStatus]) -> tuple[v.ReaderStatus, ...]:
    return tuple(v.ReaderStatus(reader=reader.reader, next_row=reader.next_row) for reader in readers)


def extraction_event_from_pb(pb: extractions_pb.WatchExtractionResponse) -> v.ExtractionEvent | None:
    """Reads an event; None for a heartbeat."""
    if pb.heartbeat:
        return None
    return v.ExtractionEvent(seq=pb.seq, extraction=extraction_from_pb(pb.extraction), snapshot=pb.snapshot)


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


# The stream


def header_from_pb(pb: extractions_pb.StreamHeader) -> v.StreamHeader:
    """Reads the header of a stream. Raises InvalidArgument for a dtype that this client does not know."""
    return v.StreamHeader(
        set_id=pb.set_id,
        columns=tuple(_column_from_pb(column) for column in pb.columns),
        first_row=pb.first_row,
        end_row=pb.end_row,
        reader=pb.reader,
        statistics=tuple(_statistics_from_pb(one) for one in pb.statistics),
        path=pb.path,
        mapped=pb.transport == extractions_pb.TRANSPORT_MAPPED,
        nonce=pb.nonce,
        block_rows=pb.block_rows,
    )


def _column_from_pb(pb: extractions_pb.Column) -> v.Column:
    name = _name(dtype_pb2.Dtype, pb.dtype).removeprefix("DTYPE_").lower()
    return v.Column(
        name=pb.name,
        dtype=v.choice(v.Dtype, name, "dtype"),
        width=pb.width,
        scale_column=pb.scale_column,
        shape=tuple(pb.shape),
    )


def _dtype(number: int, default: v.Dtype) -> v.Dtype:
    return _choice(dtype_pb2.Dtype, "DTYPE_", number, v.Dtype, default)


def _statistics_from_pb(pb: extractions_pb.ColumnStatistics) -> v.ColumnStatistics:
    return v.ColumnStatistics(
        name=pb.name,
        count=pb.count,
        mean=tuple(pb.mean),
        m2=tuple(pb.m2),
        mean_norm=pb.mean_norm,
        mean_squared_norm=pb.mean_squared_norm,
    )


def stream_event_from_pb(message: bytes) -> extractions_pb.StreamActivationsResponse:
    """Parses a message of a stream that is not a chunk framed as one field."""
    return extractions_pb.StreamActivationsResponse.FromString(message)
