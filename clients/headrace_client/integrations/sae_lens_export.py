"""Writes a set as SAELens' cached activations: a folder that `cached_activations_path` of its runners names.

One row of that dataset is one context: a `[context_size, d]` array for each hookpoint, and the context's `token_ids`.
`document` and `position` stand beside them; SAELens ignores other columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch

from headrace_client.client import HeadraceClient
from headrace_client.errors import InvalidArgument
from headrace_client.extras import needing
from headrace_client.integrations.contexts import Columns, ContextCutter
from headrace_client.values import PROVENANCE_COLUMNS, Extraction

# datasets maps whole files, so that their size costs no memory; it writes half a gigabyte itself.
SHARD_BYTES = 512 * 1024 * 1024
_BATCH_ROWS = 8192
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A finished export. Rows that fill no context are left out."""

    folder: str
    hookpoints: tuple[str, ...]
    context_size: int
    n_contexts: int
    n_rows_left_out: int
    n_files: int


def export_cached_activations(
    client: HeadraceClient,
    extraction: Extraction | str,
    folder: str | Path,
    *,
    hookpoints: Sequence[str] | None = None,
    context_size: int = 0,
    join_documents: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes all rows of an extraction that fill contexts of `context_size` (0: the recipe's) into a new folder.

    Contexts have rows of one document each, unless `join_documents`. `context_size` and `d_in` of SAELens' config must
    be these. Arrow has no bfloat16: such columns become float32. Raises InvalidArgument for an existing folder and for
    rows that fill no context, and leaves nothing behind when it fails.
    """
    known = client.extractions.get(extraction) if isinstance(extraction, str) else extraction
    names = tuple(hookpoints or known.hookpoints)
    target, size = Path(folder), context_size or known.recipe.context_size
    if target.exists():
        raise InvalidArgument(f"{target} is there already; name a new folder", fields={"folder": str(target)})
    draft = target.with_name(f".{target.name}.{uuid4().hex[:8]}.draft")
    draft.mkdir(parents=True)
    try:
        cutter = ContextCutter(size, join=join_documents)
        writer = _Writer(draft, names, size, dtype, shard_bytes)
        columns = [*names, *PROVENANCE_COLUMNS]
        with client.activations(known, columns, batch_size=_BATCH_ROWS, dtype=_DTYPES[dtype]) as stream:
            tables = ({name: part.numpy() for name, part in batch.items()} for batch in stream)
            for contexts in cutter.cut(tables):
                writer.write(contexts)
        _check_any(cutter)
        n_files = writer.finish()
        draft.rename(target)  # Now, so that a folder of that name is always complete.
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Exported(
        folder=str(target),
        hookpoints=names,
        context_size=size,
        n_contexts=cutter.n_contexts,
        n_rows_left_out=cutter.n_left_out,
        n_files=n_files,
    )


def _check_any(cutter: ContextCutter) -> None:
    if not cutter.n_contexts:
        raise InvalidArgument(
            f"none of {cutter.n_rows} rows fills a context of {cutter.context_size}: documents are shorter; take a "
            "smaller context_size, or join_documents",
            fields={"context_size": str(cutter.context_size)},
        )


class _Writer:
    """Arrow files of about `shard_bytes`, and the two JSON files that make them a dataset."""

    def __init__(self, folder: Path, names: Sequence[str], size: int, dtype: str, shard_bytes: int) -> None:
        self._folder = folder
        self._names = names
        self._size = size
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._features: Any = None
        self._writer: Any = None
        self._written = 0
        self._n_files = 0

    def write(self, contexts: Columns) -> None:
        """Appends contexts."""
        columns = {
            "token_ids": contexts["token_id"],
            "document": contexts["document"],
            "position": contexts["position"],
        }
        columns |= {name: contexts[name] for name in self._names}
        n_contexts = len(columns["token_ids"])
        step = max(1, self._shard_bytes * n_contexts // sum(part.nbytes for part in columns.values()))
        for first in range(0, n_contexts, step):
            self._append({name: part[first : first + step] for name, part in columns.items()})

    def _append(self, columns: Columns) -> None:
        arrow_writer, features = _datasets()
        if self._features is None:
            number = features.Sequence(features.Value("int32"), length=self._size)
            arrays = {
                name: features.Array2D(shape=(self._size, columns[name].shape[2]), dtype=self._dtype)
                for name in self._names
            }
            self._features = features.Features({**arrays, "token_ids": number, "document": number, "position": number})
        if self._writer is None:
            path = str(self._folder / f"{self._n_files:05d}.arrow")
            self._writer, self._written = arrow_writer.ArrowWriter(features=self._features, path=path), 0
            self._n_files += 1
        self._writer.write_batch({name: list(part) for name, part in columns.items()})
        self._written += sum(part.nbytes for part in columns.values())
        if self._written >= self._shard_bytes:
            self._close()

    def finish(self) -> int:
        """Completes the dataset; returns the number of files."""
        self._close()
        files = []
        for number in range(self._n_files):
            name = f"data-{number:05d}-of-{self._n_files:05d}.arrow"
            (self._folder / f"{number:05d}.arrow").rename(self._folder / name)
            files.append({"filename": name})
        state: dict[str, Any] = {
            "_data_files": files,
            "_fingerprint": uuid4().hex[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2))
        from datasets import DatasetInfo  # noqa: PLC0415 -- an extra

        DatasetInfo(features=self._features).write_to_directory(str(self._folder))
        return self._n_files

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.finalize()
            self._writer = None


def _datasets() -> tuple[Any, Any]:
    with needing("headrace[train]"):
        from datasets import arrow_writer, features  # noqa: PLC0415
    return arrow_writer, features
