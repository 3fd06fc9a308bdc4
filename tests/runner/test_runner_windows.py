"""Windows leave out rows, and in a causal model the tokens behind them; the rows that stay have the same values."""

from __future__ import annotations

import numpy as np
import pytest

from fix_runner import VOCAB_SIZE, WIDTH, documents, load, read_rows, run_command, save_model
from headrace_extractor.corpora.recipe import TokenWindow
from headrace_extractor.node.runner_protocol import Extract

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM  # noqa: PLC0415

    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_model(BertForMaskedLM, config, tmp_path_factory.mktemp("bert"))


def run(model, corpus, folder):
    events = run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus)), model)
    n_tokens = max(getattr(event, "n_tokens", 0) for event in events)
    return read_rows(folder, events[-1].n_rows), n_tokens


def compare(path, make_set, make_corpus, window, **recipe):
    """Checks that rows agree; returns the tokens through the model with the window and without it."""
    corpus, model = make_corpus(documents(20, seed=3)), load(path)
    whole, n_whole = run(model, corpus, make_set([SITE], **recipe))
    some, n_some = run(model, corpus, make_set([SITE], window=window, **recipe))
    place = {key: row for row, key in enumerate(zip(whole["document"], whole["position"], strict=True))}
    rows = [place[key] for key in zip(some["document"], some["position"], strict=True)]
    assert len(rows) == len(set(rows)) > 10
    assert np.array_equal(some["token_id"], whole["token_id"][rows])
    assert np.abs(some[SITE] - whole[SITE][rows]).max() < 1e-4 * np.abs(whole[SITE]).max()
    return n_some, n_whole


@pytest.mark.parametrize("packing", ["packed", "one_document"])
def test_a_causal_model_reads_no_further_than_the_last_row(tiny_model, make_set, make_corpus, packing):
    n_some, n_whole = compare(tiny_model, make_set, make_corpus, TokenWindow(start=1, end=4), packing=packing)

    assert n_some < n_whole
    if packing == "one_document":
        assert n_some <= 4 * 20


def test_an_encoder_reads_whole_documents_whatever_the_window(tiny_bert, make_set, make_corpus):
    n_some, n_whole = compare(tiny_bert, make_set, make_corpus, TokenWindow(start=1, end=4), packing="one_document")

    assert n_some >= n_whole - 60  # Documents too short for a row are left out.
