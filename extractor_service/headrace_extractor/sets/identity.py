"""The identity of a set: everything that determines its numbers; and the manifest of a new set."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from headrace_extractor.errors import StateConflict
from headrace_extractor.hookpoints.catalogue import attention_of
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.values import Assignment
from headrace_extractor.sets.activation_set import Kind
from headrace_extractor.sets.spec import ExtractionSpec
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, scale_column
from headrace_log.manifest import Manifest, segment_rows_for, set_id_of
from headrace_models.load_options import options_changing_numbers

# A WINDOW set holds at least this many segments, so that readers and the forward pass don't wait for one another's.
MIN_WINDOW_SEGMENTS = 8

_OF_THE_MODEL = ("model", "compute_dtype", "load_options", "tokenizer_digest")


def identity_of(
    spec: ExtractionSpec, model: ModelInfo, *, corpus_digest: str, compute_dtype: str, chat_template_digest: str = ""
) -> dict[str, Any]:
    """Everything that row values depend on; `max_rows`, hookpoints and retention change no value and stay out.

    `chat_template_digest` is empty, and stays out, unless the recipe asks for the template.
    """
    # Families that SDPA can't compute run with eager attention, which rounds otherwise.
    attention = attention_of(model)
    default_attention = {"attn_implementation": attention} if attention else {}
    return {
        "model": {"source": model.source, "commit_sha": model.commit_sha, "quantization": model.quantization},
        "compute_dtype": compute_dtype,
        "load_options": default_attention | options_changing_numbers(model.load_options) | {"dtype": compute_dtype},
        "tokenizer_digest": model.tokenizer_digest,
        "corpus_digest": corpus_digest,
        "recipe": spec.recipe.to_json(),
        **({"chat_template_digest": chat_template_digest} if chat_template_digest else {}),
    }


def check_same_model(identity: Mapping[str, Any], spec: ExtractionSpec, loaded: Assignment) -> None:
    """Raises StateConflict unless the loaded model computes the numbers of the set with this identity."""
    dtype = loaded.model.compute_dtype(loaded.device_id)
    now = identity_of(spec, loaded.model, corpus_digest=identity["corpus_digest"], compute_dtype=dtype)
    other = [key for key in _OF_THE_MODEL if now[key] != identity[key]]
    if other:
        raise StateConflict(
            f"What is loaded of {loaded.model.id} is not what this set was begun with; its {', '.join(other)} changed. "
            "Start the extraction again, and unload the model before if it was changed while it was loaded.",
            metadata={"changed": ", ".join(other)},
            resource=("Model", loaded.model.id),
        )


def hookpoint_columns(spec: ExtractionSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[ColumnSpec, ...]:
    """Columns of the hookpoints asked for, each 8-bit column followed by its scales; `shapes` are shapes of one row."""
    dtype = Dtype(spec.recipe.storage_dtype)
    columns = []
    for name in spec.hookpoints:
        shape, scale = shapes[name], scale_column(name) if dtype.itemsize == 1 else None
        declared = shape if len(shape) > 1 else ()
        columns.append(ColumnSpec(name=name, dtype=dtype, width=prod(shape), scale_column=scale, shape=declared))
        columns += [ColumnSpec(name=scale, dtype=Dtype.FLOAT32, width=1)] if scale else []
    return tuple(columns)


def new_manifest(spec: ExtractionSpec, identity: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
    """Manifest of a set that does not exist yet; its id is the digest of `identity`."""
    columns = (*PROVENANCE, *hookpoint_columns(spec, shapes))
    segment_rows = segment_rows_for(columns)
    if spec.retention.kind is Kind.WINDOW:
        window_rows = spec.retention.window_bytes // sum(column.row_bytes for column in columns)
        segment_rows = max(1, min(segment_rows, window_rows // MIN_WINDOW_SEGMENTS))
    return Manifest(
        set_id=set_id_of(identity),
        identity=identity,
        columns=columns,
        segment_rows=segment_rows,
        retention=spec.retention.kind,
    )
