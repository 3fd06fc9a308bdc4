"""The two Parquet tables for feature analysis: `features.parquet` and `top_rows.parquet`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace_train.results.analysis import Contexts, Features, IntArray, TopRows

FEATURES = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("firing_frequency", pa.float64(), nullable=False),
        pa.field("mean_activation", pa.float32(), nullable=False),
        pa.field("max_activation", pa.float32(), nullable=False),
        pa.field("dead", pa.bool_(), nullable=False),
    ]
)
TOP_ROWS = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("document", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("context_left", pa.string(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("context_right", pa.string(), nullable=False),
    ]
)


def features_table(features: Features) -> pa.Table:
    """Returns a table with one line per feature."""
    n_features = len(features.n_firings)
    columns = [
        np.arange(n_features),
        features.frequency.numpy(),
        features.mean.numpy(),
        features.maximum.numpy(),
        features.dead.numpy(),
    ]
    return pa.table([pa.array(c, t.type) for c, t in zip(columns, FEATURES, strict=True)], schema=FEATURES)


def top_rows_table(top: TopRows, contexts: Iterable[Contexts], texts: Mapping[int, str]) -> pa.Table:
    """Returns a table with one line per feature and rank.

    `contexts`, in the order of rows, cover every row of `top`; `texts` has the text of every token in them.
    """
    parts = [part for part in contexts if len(part.row)]
    rows = _concatenated([part.row for part in parts])
    at = np.searchsorted(rows, top.row.numpy())
    token_id = _concatenated([part.token for part in parts])[at]
    left = [_text(ids, texts) for part in parts for ids in part.left]
    right = [_text(ids, texts) for part in parts for ids in part.right]
    columns = [
        top.feature.numpy(),
        top.rank.numpy(),
        top.row.numpy(),
        top.activation.numpy(),
        token_id,
        _concatenated([part.document for part in parts])[at],
        _concatenated([part.position for part in parts])[at],
        [left[place] for place in at],
        [texts[token] for token in token_id.tolist()],
        [right[place] for place in at],
    ]
    return pa.table([pa.array(c, t.type) for c, t in zip(columns, TOP_ROWS, strict=True)], schema=TOP_ROWS)


def write_table(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a table with `metadata` in its schema; a crash leaves the whole file or none."""
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table.replace_schema_metadata(dict(metadata)), partial, compression="zstd")
    partial.replace(path)


def _concatenated(parts: list[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _text(ids: IntArray, texts: Mapping[int, str]) -> str:
    return "".join(texts[token] for token in ids.tolist() if token >= 0)
