"""The analysis agrees with a direct computation over all rows."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fix_train import blocks_of, documents, packed_rows
from headrace_client.values import Recipe
from headrace_train.results.analysis import FeatureCounter, count_features, find_contexts
from headrace_train.results.tables import features_table, top_rows_table, write_table
from headrace_train.rows.blocks import RowFilter

N_ROWS, N_FEATURES, N_TOP = 700, 20, 6


def sparse_acts(seed=0):
    """Feature activations with many ties, a feature that never fires, and one that fires less than N_TOP times."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(1, 9, (N_ROWS, N_FEATURES), generator=generator) / 4
    acts = levels * (torch.rand(N_ROWS, N_FEATURES, generator=generator) < 0.1)
    acts[:, 3] = 0
    acts[:, 7] = 0
    acts[[5, 600], 7] = torch.tensor([1.0, 2.0])
    return acts


def counted(acts, *, batch_rows):
    counter = FeatureCounter(N_FEATURES, N_TOP)
    for rows in torch.arange(len(acts)).split(batch_rows):
        counter.add(rows, acts[rows])
    return counter


@pytest.mark.parametrize("batch_rows", [13, 64, 1000])
def test_top_rows_are_those_of_a_sort_over_all_rows(batch_rows):
    acts = sparse_acts()
    expected = [
        (feature, rank + 1, row, acts[row, feature].item())
        for feature in range(N_FEATURES)
        for rank, row in enumerate(sorted(range(N_ROWS), key=lambda r: (-acts[r, feature], r))[:N_TOP])
        if acts[row, feature] > 0
    ]

    top = counted(acts, batch_rows=batch_rows).top_rows()

    found = zip(*(c.tolist() for c in (top.feature, top.rank, top.row, top.activation)), strict=True)
    assert list(found) == expected


@pytest.mark.parametrize("batch_rows", [13, 64, 1000])
def test_features_are_counted_over_all_rows(batch_rows):
    acts = sparse_acts()
    fires = acts > 0

    features = counted(acts, batch_rows=batch_rows).features()

    assert torch.equal(features.n_firings, fires.sum(0))
    assert torch.allclose(features.frequency, fires.double().mean(0))
    assert torch.allclose(features.mean, acts.sum(0) / fires.sum(0).clamp_min(1))
    assert torch.equal(features.maximum, acts.max(0).values)
    assert features.dead.nonzero().flatten().tolist() == [3]


def test_rows_left_out_are_counted_and_do_not_fire():
    class Identity:
        device = "cpu"

        def encode(self, rows):
            return rows

    acts = sparse_acts()
    acts[10] = 1e6
    positions = torch.arange(N_ROWS, dtype=torch.int32) % 50
    row_filter = RowFilter(Recipe(packing="one_document"), drop_bos=True, max_norm_multiple=10.0)
    row_filter.norm_limit = 1e3
    counter = FeatureCounter(N_FEATURES, N_TOP)

    *_, counts = count_features(Identity(), blocks_of(acts, positions), row_filter, counter)

    assert (counts.n_rows, counts.n_sinks, counts.n_outliers) == (N_ROWS, N_ROWS // 50, 1)
    assert counter.features().n_rows == N_ROWS - N_ROWS // 50 - 1
    assert counter.features().maximum.max() < 3
    assert not set(counter.top_rows().row.tolist()) & {10, *range(0, N_ROWS, 50)}


def batches_of(provenance, batch_rows):
    n_rows = len(provenance["token_id"])
    for at in range(0, n_rows, batch_rows):
        yield {name: torch.from_numpy(column[at : at + batch_rows]) for name, column in provenance.items()}


@pytest.mark.parametrize("batch_rows", [3, 40, 5000])
@pytest.mark.parametrize("n_tokens", [0, 1, 5])
def test_contexts_are_the_neighbours_in_the_same_document(batch_rows, n_tokens):
    provenance, _ = packed_rows(documents(30))
    tokens, documents_ = provenance["token_id"], provenance["document"]
    n_rows = len(tokens)
    rows = np.unique([*np.random.default_rng(0).integers(0, n_rows, 80).tolist(), 0, n_rows - 1])

    parts = list(find_contexts(batches_of(provenance, batch_rows), rows, n_tokens))

    assert np.concatenate([part.row for part in parts]).tolist() == rows.tolist()
    for part in parts:
        for at, row in enumerate(part.row.tolist()):
            line = [*part.left[at], part.token[at], *part.right[at]]
            around = range(row - n_tokens, row + n_tokens + 1)
            assert line == [tokens[r] if 0 <= r < n_rows and documents_[r] == documents_[row] else -1 for r in around]
            assert (part.document[at], part.position[at]) == (documents_[row], provenance["position"][row])


def test_tables_read_back_as_written(tmp_path):
    provenance, _ = packed_rows(documents(60))
    acts = sparse_acts()
    counter = counted(acts, batch_rows=100)
    top = counter.top_rows()
    contexts = list(find_contexts(batches_of(provenance, 90), torch.unique(top.row).numpy(), 4))
    texts = {token: f" t{token}" for token in range(100)}

    write_table(features_table(counter.features()), tmp_path / "features.parquet", {"set_id": "s"})
    write_table(top_rows_table(top, contexts, texts), tmp_path / "top_rows.parquet", {"set_id": "s"})

    features, rows = pq.read_table(tmp_path / "features.parquet"), pq.read_table(tmp_path / "top_rows.parquet")
    assert features.column_names == ["feature", "firing_frequency", "mean_activation", "max_activation", "dead"]
    assert features["feature"].to_pylist() == list(range(N_FEATURES))
    assert features.schema.metadata == {b"set_id": b"s"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "top_rows.parquet"]
    line = rows.to_pylist()[17]
    row = line["row"]
    same = [r for r in range(row - 4, row + 5) if r >= 0 and provenance["document"][r] == line["document"]]
    assert line["activation"] == acts[row, line["feature"]]
    assert line["token"] == f" t{provenance['token_id'][row]}" == texts[line["token_id"]]
    assert line["context_left"] == "".join(texts[provenance["token_id"][r]] for r in same if r < row)
    assert line["context_right"] == "".join(texts[provenance["token_id"][r]] for r in same if r > row)
    assert line["position"] == provenance["position"][row]


def test_an_sae_that_never_fires_gives_an_empty_table():
    top = FeatureCounter(N_FEATURES, N_TOP).top_rows()

    assert top_rows_table(top, [], {}).num_rows == 0
