"""Statistics of the columns of a stream, as its header has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from headrace.extractor.v1 import extraction_service_pb2 as pb
from headrace_log.layout import ColumnSpec
from headrace_log.statistics import ColumnStatistics, load_statistics

# A header travels as one message, of which clients take 4 MiB.
MAX_VECTOR_BYTES = 2 * 1024 * 1024


def statistics_to_pb(folder: Path, columns: Iterable[ColumnSpec]) -> list[pb.ColumnStatistics]:
    """Statistics of the columns that have any, as of now; vectors beyond `MAX_VECTOR_BYTES` are left out."""
    messages, room = [], MAX_VECTOR_BYTES
    for column in columns:
        if column.is_provenance or (found := load_statistics(folder, column)) is None:
            continue
        room -= found.mean.nbytes + found.m2.nbytes
        messages.append(_to_pb(column.name, found, vectors=room >= 0))
    return messages


def _to_pb(name: str, statistics: ColumnStatistics, *, vectors: bool) -> pb.ColumnStatistics:
    return pb.ColumnStatistics(
        name=name,
        count=statistics.count,
        mean=statistics.mean.tolist() if vectors else (),
        m2=statistics.m2.tolist() if vectors else (),
        mean_norm=statistics.mean_norm,
        mean_squared_norm=statistics.mean_squared_norm,
    )
