"""The analysis as a phase of the job: reads streams, writes both tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace_client.values import PROVENANCE_COLUMNS, Progress, StreamState
from headrace_train.reporting.progress import Meter, Reporter
from headrace_train.results.analysis import Contexts, FeatureCounter, RowCounts, TopRows, count_features, find_contexts
from headrace_train.results.folder import FEATURES_FILE, TOP_ROWS_FILE
from headrace_train.results.tables import features_table, top_rows_table, write_table
from headrace_train.rows.blocks import RowFilter, read_blocks
from headrace_train.rows.source import Source
from headrace_train.training.evaluation import batch_rows

FILES = (FEATURES_FILE, TOP_ROWS_FILE)
_CONTEXT_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Results of the analysis."""

    counts: RowCounts
    n_features: int
    n_dead: int


def analyse(
    sae: Any,
    source: Source,
    row_filter: RowFilter,
    reporter: Reporter,
    *,
    out: Path,
    n_top: int,
    n_context_tokens: int,
) -> Findings:
    """Reads all rows of the set twice, first with activations, and writes both tables."""
    counter = FeatureCounter(sae.cfg.d_sae, n_top)
    meter, counts = Meter(), RowCounts()

    def waiting(progress: Progress) -> None:
        doing = "waiting for rows" if progress.state is StreamState.WAITING else ""
        reporter.tick(meter.tick("analysis", counts.n_rows, source.n_rows, doing=doing))

    with source.stream(batch_size=min(batch_rows(sae), source.n_rows), on_progress=waiting) as stream:
        for counts in count_features(sae, read_blocks(stream, source.hookpoint), row_filter, counter):
            tick = meter.tick("analysis", counts.n_rows, source.n_rows)
            reporter.tick(tick, last=counts.n_rows == source.n_rows)

    about = {"set_id": source.extraction.set_id, "hookpoint": source.hookpoint}
    features, top = counter.features(), counter.top_rows()
    write_table(features_table(features), out / FEATURES_FILE, about)
    contexts = _contexts(source, reporter, top, n_context_tokens)
    ids = sorted({int(token) for part in contexts for token in part.token_ids()})
    texts = dict(zip(ids, source.client.decode_tokens(source.extraction.model_id, ids), strict=True))
    write_table(top_rows_table(top, contexts, texts), out / TOP_ROWS_FILE, about)
    return Findings(counts=counts, n_features=len(features.dead), n_dead=int(features.dead.sum()))


def _contexts(source: Source, reporter: Reporter, top: TopRows, n_tokens: int) -> list[Contexts]:
    meter = Meter()
    found: list[Contexts] = []
    rows = torch.unique(top.row).numpy()
    with source.stream(PROVENANCE_COLUMNS, batch_size=min(_CONTEXT_BATCH_ROWS, source.n_rows)) as stream:
        for contexts in find_contexts(stream, rows, n_tokens):
            found.append(contexts)
            reporter.tick(meter.tick("contexts", min(stream.next_row, source.n_rows), source.n_rows))
    reporter.tick(meter.tick("contexts", source.n_rows, source.n_rows), last=True)
    return found
