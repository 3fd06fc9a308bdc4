"""Writes a sealed set of random values and a finished extraction into a data folder, as an extractor keeps them."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.sets.identity import new_manifest
from headrace_extractor.sets.spec import ExtractionSpec
from headrace_log.index import SegmentIndex
from headrace_log.layout import segment_path
from headrace_log.manifest import Manifest
from headrace_log.reader import RowRun
from headrace_log.segment import DATA_OFFSET
from headrace_log.writer import SetWriter

HOOKPOINT = "blocks.14.hook_resid_post"
WIDTH = 2304  # That of Gemma-2 2B.
EXTRACTION_ID = "xreplay"
CHUNK_BYTES = 1024 * 1024
_CORPUS_ID = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySet:
    """A set under `data_dir`; its hookpoint column is bfloat16."""

    data_dir: Path
    folder: Path
    n_rows: int
    row_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the hookpoint column."""
        return self.n_rows * self.row_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of every chunk: as many whole rows as fit into 1 MiB."""
        return CHUNK_BYTES // self.row_bytes * self.row_bytes


def make_replay_set(data_dir: Path, size_bytes: int) -> ReplaySet:
    """Writes a set with about `size_bytes` in its hookpoint column; afterwards it is in the page cache."""
    spec = ExtractionSpec(
        model_id="replay",
        corpus_id=_CORPUS_ID,
        hookpoints=(HOOKPOINT,),
        recipe=Recipe(storage_dtype="bfloat16"),
    )
    manifest = new_manifest(spec, {"made_for": "bench", "recipe": spec.recipe.to_json()}, {HOOKPOINT: (WIDTH,)})
    row_bytes = manifest.column(HOOKPOINT).row_bytes
    chunk_rows = CHUNK_BYTES // row_bytes
    # Segments of whole chunks: all chunks then have the same size, which the raw clients are given once.
    manifest = replace(manifest, segment_rows=manifest.segment_rows // chunk_rows * chunk_rows)
    folder = data_dir / "activations" / manifest.set_id
    manifest.save(folder)
    n_rows = size_bytes // row_bytes // chunk_rows * chunk_rows
    _fill(folder, n_rows)
    CorpusStore(data_dir / "corpora").ingest_tokens(_CORPUS_ID, [[0, 1, 2]])
    _record(data_dir, folder, spec, manifest.set_id, n_rows)
    return ReplaySet(data_dir=data_dir, folder=folder, n_rows=n_rows, row_bytes=row_bytes)


def runs(folder: Path, n_rows: int) -> Iterator[RowRun]:
    """Maps the hookpoint column and yields the same runs of rows that the extractor sends as chunks.

    The sides to compare with may map files, which the extractor does not: a file that shrinks would end its process.
    """
    column = Manifest.load(folder).column(HOOKPOINT)
    chunk_rows = max(1, CHUNK_BYTES // column.row_bytes)
    for record in SegmentIndex.load(folder).records:
        with segment_path(folder, column, record.segment).open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapping.madvise(mmap.MADV_SEQUENTIAL)
        rows = memoryview(mapping)[DATA_OFFSET:]
        for row in range(record.first_row, min(record.end_row, n_rows), chunk_rows):
            end_row = min(row + chunk_rows, record.end_row, n_rows)
            start, end = (at - record.first_row for at in (row, end_row))
            view = rows[start * column.row_bytes : end * column.row_bytes]
            yield RowRun(row, end_row - row, (view,))


def touch(view: memoryview) -> int:
    """Reads one byte of each page of a chunk and adds them up, as every client does."""
    return int(np.frombuffer(view, dtype=np.uint8)[::4096].sum(dtype=np.int64))


def _fill(folder: Path, n_rows: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 26, dtype=np.uint8)
    with SetWriter.open(folder) as writer:
        while writer.next_row < n_rows:
            reservation = writer.reserve(n_rows - writer.next_row)
            for view in reservation.columns.values():
                np.frombuffer(view, dtype=np.uint8)[:] = np.resize(noise, len(view))
            writer.commit(reservation.n_rows, {})
        writer.finish()


def _record(data_dir: Path, folder: Path, spec: ExtractionSpec, set_id: str, n_rows: int) -> None:
    record: dict[str, Any] = {
        "id": EXTRACTION_ID,
        "request_ids": [],
        "spec": spec.to_json(),
        "set_id": set_id,
        "path": str(folder),
        "state": "DONE",
        "failure": None,
        "n_rows": n_rows,
        "n_rows_computed": n_rows,
        "cached": False,
        "create_time": time.time(),
    }
    path = data_dir / "extractions" / f"{EXTRACTION_ID}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
