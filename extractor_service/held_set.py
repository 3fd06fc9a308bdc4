"""What a node holds of a set, as its folder says: extractions of different columns and lengths share one set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from activation_log import retention
from activation_log.index import SegmentIndex
from activation_log.manifest import Manifest
from extractor_service.values import Extraction


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSet:
    """One set on this node; `n_rows` counts the rows that all columns have, `size_bytes` what it takes on disk."""

    id: str
    model_id: str
    corpus_id: str
    columns: tuple[str, ...]
    retention: str
    path: str
    n_rows: int = 0
    size_bytes: int = 0
    complete: bool = False
    deleted: bool = False

    @classmethod
    def of(cls, extraction: Extraction) -> HeldSet:
        """Reads the set that an extraction writes or wrote. Raises the log's errors if the folder can't be read.

        Rows of the extraction that are not sealed yet count if it has all columns of the set.
        """
        spec, folder = extraction.spec, Path(extraction.path)
        gone = cls(
            id=extraction.set_id,
            model_id=spec.model_id,
            corpus_id=spec.corpus_id,
            columns=spec.hookpoints,
            retention=spec.retention.kind.upper(),
            path=extraction.path,
            deleted=True,
        )
        if not (folder / "manifest.json").exists():
            return gone
        manifest = Manifest.load(folder)
        columns = tuple(column.name for column in manifest.columns)
        n_rows = SegmentIndex.load(folder).n_rows(columns)
        if set(columns[3:]) <= set(spec.hookpoints):
            n_rows = max(n_rows, extraction.n_rows)
        return cls(
            id=gone.id,
            model_id=gone.model_id,
            corpus_id=gone.corpus_id,
            columns=columns,
            retention=gone.retention,
            path=gone.path,
            n_rows=n_rows,
            size_bytes=retention.size_bytes(folder),
            complete=manifest.complete and n_rows == manifest.total_rows,
        )
