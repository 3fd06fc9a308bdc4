"""The parity receipt measures rows against plain transformers, and a run whose rows are wrong ends."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from fix_runner import WIDTH, documents, load, run_command
from fix_zoo import ZOO, random_model, zoo_batch, zoo_model
from headrace_extractor.corpora.packing import Cursor, TokenBatch
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.hookpoints.places import NOT_AT_ALL
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.hooks.binding import anatomy_of, offered_sites
from headrace_extractor.runner.models.loading import LoadedModel
from headrace_extractor.runner.passes import extract as extract_module
from headrace_extractor.runner.passes import parity
from headrace_extractor.runner.passes.alone import rows_alone
from headrace_extractor.runner.passes.forward import forward_rows
from headrace_extractor.runner.passes.samples import MAX_TOKENS, MIN_TOKENS, choose, choose_longest
from headrace_extractor.sets.receipt import receipt_of
from headrace_log.layout import PROVENANCE, ColumnSpec, Dtype, scale_column
from headrace_log.manifest import Manifest

SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_attn_out", "blocks.3.hook_resid_post"]


@pytest.fixture
def make_set(tmp_path):
    def make(sites=SITES, **recipe):
        recipe = Recipe(**{"context_size": 64, "batch_size": 2, "bos": "document"} | recipe)
        folder = tmp_path / f"set-{len(list(tmp_path.iterdir()))}"
        identity = {"recipe": recipe.to_json(), "compute_dtype": "float32"}
        columns = (*PROVENANCE, *columns_of(sites, recipe))
        Manifest(set_id="s", identity=identity, columns=columns, segment_rows=100).save(folder)
        return folder

    return make


def columns_of(sites, recipe):
    for site in sites:
        dtype = Dtype(recipe.storage_dtype)
        scale = scale_column(site) if dtype.itemsize == 1 else None
        yield ColumnSpec(name=site, dtype=dtype, width=WIDTH, scale_column=scale)
        if scale:
            yield ColumnSpec(name=scale, dtype=Dtype.FLOAT32, width=1)


def extract(folder, corpus, model, **fields):
    return run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus), **fields), model)[-1]


def receipt(folder):
    return json.loads((folder / "manifest.json").read_text())["receipt"]


@pytest.mark.parametrize("name", ZOO)
def test_documents_packed_and_alone_agree_at_every_site_of_every_architecture(name):
    model = zoo_model(name)
    pieces = [np.arange(3, 20), np.arange(30, 47)[::-1].copy()]
    pieces = pieces if anatomy_of(model).isolation != NOT_AT_ALL else pieces[:1]
    sites = offered_sites(model)
    packed = forward_rows(model, zoo_batch(pieces), sites)

    for at, piece in zip((0, 17), pieces, strict=False):
        for site, alone in rows_alone(model, piece, sites).items():
            together = packed[site][at : at + 17]
            assert torch.allclose(together, alone, atol=1e-3 * float(alone.abs().max())), (name, site)


def test_a_run_leaves_a_receipt_of_every_column(tiny_model, make_set, make_corpus):
    folder, model = make_set(), load(tiny_model)
    extract(folder, make_corpus(documents(40)), model)

    found = receipt(folder)

    assert sorted(found) == sorted(SITES)
    for entry in found.values():
        assert entry["rows"] >= MIN_TOKENS
        assert entry["max_difference"] < 1e-4
        assert entry["max_relative_error"] < 1e-4
        assert entry["min_cosine"] > 0.9999


def test_the_same_run_has_the_same_receipt(tiny_llama, make_set, make_corpus):
    corpus, model = make_corpus(documents(40)), load(tiny_llama)
    one, other = make_set(), make_set()
    extract(one, corpus, model)
    extract(other, corpus, model)

    assert receipt(one) == receipt(other)


def test_few_tokens_go_through_the_model_twice(tiny_llama, make_set, make_corpus, monkeypatch):
    model, alone = load(tiny_llama), []
    real = parity.rows_alone
    monkeypatch.setattr(parity, "MAX_SHARE", 1 / 20)
    monkeypatch.setattr(parity, "FIRST_GAP", 8)
    monkeypatch.setattr(
        parity, "rows_alone", lambda model, ids, sites: alone.append(len(ids)) or real(model, ids, sites)
    )
    folder = make_set()
    n_tokens = extract(folder, make_corpus(documents(60)), model).n_rows

    assert 2 <= len(alone) <= parity.MAX_SAMPLES
    assert sum(alone[1:]) <= n_tokens * parity.MAX_SHARE
    assert alone[0] <= MAX_TOKENS
    assert receipt(folder)[SITES[0]]["rows"] == sum(alone)


def test_a_column_added_later_is_compared_in_its_own_run(tiny_llama, make_set, make_corpus):
    corpus, model = make_corpus(documents(40)), load(tiny_llama)
    folder = make_set(SITES[:1])
    extract(folder, corpus, model)
    first = receipt(folder)
    Manifest.update(folder, lambda known: known.with_columns(list(columns_of(SITES[1:2], Recipe()))))

    extract(folder, corpus, model, columns=[SITES[1]])

    assert receipt(folder)[SITES[0]] == first[SITES[0]]
    assert receipt(folder)[SITES[1]]["max_relative_error"] < 1e-4
    whole = receipt_of(Manifest.load(folder), SITES)
    assert [column.name for column in whole.columns] == SITES[:2]
    assert whole.n_rows == first[SITES[0]]["rows"]


def test_a_run_that_goes_on_keeps_the_receipt_or_makes_one(tiny_llama, make_set, make_corpus):
    corpus, model = make_corpus(documents(40)), load(tiny_llama)
    folder = make_set()
    extract(folder, corpus, model, max_rows=1)
    assert receipt(folder)[SITES[0]]["rows"] == 1
    Manifest.update(folder, lambda known: replace(known, receipt={}))

    extract(folder, corpus, model, max_rows=300)
    found = receipt(folder)
    extract(folder, corpus, model)

    assert sorted(found) == sorted(SITES)
    assert receipt(folder) == found


def test_a_column_without_a_finite_row_has_no_receipt_and_is_compared_by_the_next_run(
    tiny_llama, make_set, make_corpus
):
    corpus, model = make_corpus(documents(40)), load(tiny_llama)
    broken = load(tiny_llama)
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    folder = make_set()
    extract(folder, corpus, broken, max_rows=64, allow_non_finite=True)
    assert list(receipt(folder)) == SITES[:1]

    extract(folder, corpus, model)

    assert sorted(receipt(folder)) == sorted(SITES)
    assert all(entry["rows"] for entry in receipt(folder).values())


def test_the_longest_documents_are_compared_too(tiny_llama, make_set, make_corpus, monkeypatch):
    model, alone = load(tiny_llama), []
    real = parity.rows_alone
    monkeypatch.setattr(parity, "MAX_SHARE", 1 / 4)
    monkeypatch.setattr(parity, "FIRST_GAP", 4)
    monkeypatch.setattr(
        parity, "rows_alone", lambda model, ids, sites: alone.append(len(ids)) or real(model, ids, sites)
    )
    texts = [text for pair in zip(documents(40, longest=30), documents(40, longest=500), strict=True) for text in pair]
    extract(make_set(context_size=256), make_corpus(texts), model)

    assert alone[0] <= MAX_TOKENS
    assert max(alone[1::2]) > 200


def test_a_single_wrong_row_ends_the_run(tiny_model, make_set, make_corpus, monkeypatch):
    def with_wrong_rows(model, batch, sites):
        every_20th = (torch.arange(batch.token_ids.size) % 20 == 0)[:, None]  # One of the sample's, or a few.
        return {
            name: torch.where(every_20th, 1.02 * rows, rows) for name, rows in forward_rows(model, batch, sites).items()
        }

    monkeypatch.setattr(extract_module, "forward_rows", with_wrong_rows)

    with pytest.raises(ModelUnsupported, match="the same document alone"):
        extract(make_set(), make_corpus(documents(40)), load(tiny_model))


def test_an_expert_chosen_by_a_hair_is_excused(make_corpus, tmp_path):
    """Of 40 rows one may be another where tokens choose experts, and none where they do not."""
    alone = torch.randn(40, WIDTH)
    stored = alone.clone()
    stored[7] *= 1.5
    column = ColumnSpec(name="x", dtype=Dtype.FLOAT32, width=WIDTH)
    checks = {
        name: parity.ParityCheck(zoo_model(name), [column], [], None, lambda _: None) for name in ("mixtral", "llama")
    }

    assert checks["mixtral"]._compare(column, stored, alone).max_relative_error == pytest.approx(0.5)
    with pytest.raises(ModelUnsupported):
        checks["llama"]._compare(column, stored, alone)
    stored[:4] *= 1.5
    with pytest.raises(ModelUnsupported, match="5% of the rows"):
        checks["mixtral"]._compare(column, stored, alone)


def test_a_residual_stream_that_transformers_lists_behind_each_block_is_right(make_set, make_corpus):
    config = AutoConfig.for_model("mamba", hidden_size=WIDTH, num_hidden_layers=4, vocab_size=97, state_size=8)
    model = random_model(config)
    folder = make_set(
        packing="one_document", sites=[f"blocks.{n}.hook_resid_{s}" for n in (1, 3) for s in ("pre", "post")]
    )
    loaded = LoadedModel(model=model, device=torch.device("cpu"), files_path=folder, measured_bytes=0, files=())
    extract(folder, make_corpus(documents(40)), loaded)

    for entry in receipt(folder).values():
        assert entry["rows"] > 0
        assert entry["max_difference"] == 0


def test_documents_that_see_one_another_end_the_run(tiny_model, make_set, make_corpus, monkeypatch):
    def without_isolation(model, batch, sites):
        positions = np.tile(np.arange(batch.token_ids.shape[1], dtype=np.int32), (len(batch.token_ids), 1))
        return forward_rows(model, TokenBatch(**{**fields_of(batch), "position_ids": positions}), sites)

    monkeypatch.setattr(extract_module, "forward_rows", without_isolation)

    with pytest.raises(ModelUnsupported, match="the same document alone") as caught:
        extract(make_set(), make_corpus(documents(40)), load(tiny_model))

    assert caught.value.metadata["column"] in SITES


def test_another_layer_than_the_one_asked_for_ends_the_run(tiny_model, make_set, make_corpus, monkeypatch):
    real = extract_module.bind

    def one_too_deep(model, names):
        sites = real(model, ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"])
        wrong = type(sites[1])(name=sites[0].name, module=sites[1].module, is_input=sites[1].is_input)
        return (wrong,)

    monkeypatch.setattr(extract_module, "bind", one_too_deep)

    with pytest.raises(ModelUnsupported, match=r"blocks\.1\.hook_resid_post"):
        extract(make_set(["blocks.1.hook_resid_post"]), make_corpus(documents(40)), load(tiny_model))


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("float16", 1e-5, 1e-3), ("bfloat16", 1e-4, 8e-3), ("float8_e4m3", 0.005, 0.05), ("int8", 0.001, 0.05)],
)
def test_what_storing_loses_shows(tiny_llama, make_set, make_corpus, dtype, least, most):
    folder = make_set(storage_dtype=dtype)
    extract(folder, make_corpus(documents(40)), load(tiny_llama))

    for entry in receipt(folder).values():
        assert least < entry["max_relative_error"] < most


@pytest.mark.parametrize(
    "recipe",
    [
        {"packing": "one_document"},
        {"attend_across_documents": True},
        {"drop_special_tokens": True, "drop_first_positions": 3},
        {"bos": "none"},
    ],
)
def test_every_recipe_has_its_receipt(tiny_model, make_set, make_corpus, recipe):
    folder = make_set(**recipe)
    extract(folder, make_corpus(documents(40)), load(tiny_model))

    for entry in receipt(folder).values():
        assert entry["rows"] > 8
        assert entry["max_relative_error"] < 1e-4


def batch_of(*sequences):
    """A batch of sequences, each given by the lengths of its documents."""
    positions = np.array([np.concatenate([np.arange(n) for n in lengths]) for lengths in sequences], np.int32)
    return TokenBatch(
        token_ids=np.arange(positions.size, dtype=np.int32).reshape(positions.shape),
        position_ids=positions,
        documents=np.zeros_like(positions),
        positions=positions,
        keep=np.ones(positions.shape, np.bool_),
        start=Cursor(),
        next=Cursor(),
    )


def fields_of(batch):
    return {name: getattr(batch, name) for name in TokenBatch.__dataclass_fields__}


@pytest.mark.parametrize(
    ("sequences", "most", "first", "n_tokens"),
    [
        # A document behind another is taken, though one at the start of a sequence is longer.
        ([[20, 60], [70, 10]], 128, 20, 60),
        ([[20, 4, 56], [30, 30, 20]], 128, 24, 56),
        ([[20, 200, 40], [100, 160]], 128, 220, 40),
        ([[20, 200], [70, 150]], 128, 290, 128),
        ([[80], [80]], 128, 0, 80),
        ([[300]], 128, 0, 128),
        ([[300]], None, 0, 300),
        ([[5, 3, 7, 5]], 128, 8, 7),  # All documents are too short: the longest is taken.
    ],
)
def test_the_longest_document_behind_another_that_is_cheap_is_chosen(sequences, most, first, n_tokens):
    sample = choose(batch_of(*sequences), most, 1000)

    assert (sample.token_ids[0], len(sample.token_ids)) == (first, n_tokens)
    assert (sample.first_row, sample.end_row) == (first, first + n_tokens)


def test_a_document_whose_rows_will_not_be_stored_is_left_alone():
    batch = batch_of([20, 30, 30], [30, 20, 30])
    assert choose(batch_of([20, 30, 30], [29, 20, 31]), 128, 160).first_row == 129
    assert choose_longest(batch, 30, 45).first_row == 0
    assert choose_longest(batch, 30, 50).first_row == 20
    assert choose_longest(batch, 19, 160) is None

    assert choose(batch, 128, 100).first_row == 20
    assert choose(batch, 128, 25).first_row == 0
    assert choose(batch, 128, 10).first_row == 0


def test_an_extraction_of_less_than_a_batch_has_a_receipt(tiny_llama, make_set, make_corpus):
    folder = make_set(batch_size=64)
    extract(folder, make_corpus(documents(40)), load(tiny_llama), max_rows=70)

    for entry in receipt(folder).values():
        assert entry["rows"] >= MIN_TOKENS
        assert entry["max_relative_error"] < 1e-4
