"""Counts of rows are remembered for as long as nothing that they depend on has changed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from fix_extractor import model_info
from headrace_extractor.corpora.counting import RowCount
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.extractions import estimates
from headrace_extractor.sets.spec import ExtractionSpec


async def test_rows_are_counted_again_for_a_model_that_was_prepared_again(tmp_path, monkeypatch):
    counts = []

    def count(*what):
        counts.append(what)
        return RowCount(n_rows=len(counts), n_tokens=1, exact=True)

    async def get_model(model_id):
        return model

    monkeypatch.setattr(estimates, "count", count)
    store = CorpusStore(tmp_path)
    store.ingest_tokens("c", [[1, 2, 3]])
    counter = estimates.CorpusRowCounter(store, SimpleNamespace(get_model=get_model))
    spec = ExtractionSpec(model_id="m", corpus_id="c", hookpoints=("x",), recipe=Recipe())
    model = model_info(tmp_path)
    found = [(await counter.count(spec)).n_rows for _ in range(2)]
    model = replace(model, commit_sha="sha256:2")
    found.append((await counter.count(spec)).n_rows)

    assert found == [1, 1, 2]
