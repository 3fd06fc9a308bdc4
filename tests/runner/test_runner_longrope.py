"""LongRoPE rotates all tokens of a batch by its longest sequence: rows must not depend on the rest of the batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fix_runner import VOCAB_SIZE, load, read_rows, run_command, save_model
from fix_zoo import zoo_config
from headrace_extractor.corpora.recipe import TokenWindow
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.passes import samples

SITE = "blocks.1.hook_resid_post"
LIMIT = 150  # More tokens than the parity check takes of a document whose beginning later tokens don't change.
LENGTHS = (240, 30, 150, 151, 20, 400)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "rope_theta": 1e4}
    config = zoo_config(
        "phi3",
        max_position_embeddings=512,
        original_max_position_embeddings=LIMIT,
        rope_parameters=rope,
    )
    return load(save_model(AutoModelForCausalLM.from_config, config, tmp_path_factory.mktemp("phi3")))


@pytest.fixture
def corpus(make_corpus):
    rng = np.random.default_rng(0)
    return make_corpus([rng.integers(3, VOCAB_SIZE, length).astype(np.int32) for length in LENGTHS])


def run(model, corpus, folder):
    events = run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus)), model)
    return read_rows(folder, events[-1].n_rows)


def alone(model, rows):
    """Computes the rows of each document by itself."""
    by_document = np.split(rows["token_id"], np.flatnonzero(np.diff(rows["document"])) + 1)
    with torch.inference_mode():
        ids = [torch.from_numpy(tokens.astype(np.int64))[None] for tokens in by_document]
        states = [model.model(input_ids=each, output_hidden_states=True).hidden_states[2][0] for each in ids]
    return torch.cat(states).numpy()


def test_documents_that_would_change_one_anothers_rotation_are_refused(model, corpus, make_set):
    with pytest.raises(FieldInvalid, match=f"one_document, or a context_size of at most {LIMIT}") as caught:
        run(model, corpus, make_set([SITE], context_size=LIMIT + 1))

    assert caught.value.field == "spec.recipe.context_size"


def test_a_document_in_a_batch_of_its_own_may_be_as_long_as_it_likes(model, corpus, make_set):
    rows = run(model, corpus, make_set([SITE], packing="one_document", bos="none", context_size=512))

    assert np.abs(rows[SITE] - alone(model, rows)).max() < 1e-4 * np.abs(rows[SITE]).max()


@pytest.mark.parametrize("recipe", [{"context_size": LIMIT}, {"context_size": 300, "attend_across_documents": True}])
def test_sequences_that_are_all_rotated_alike_agree_with_what_each_gives_alone(model, corpus, make_set, recipe):
    folder = make_set([SITE], **recipe)
    run(model, corpus, folder)

    (entry,) = json.loads((folder / "manifest.json").read_text())["receipt"].values()
    assert entry["rows"] > samples.MIN_TOKENS
    assert entry["max_relative_error"] < 1e-4


@pytest.mark.parametrize("recipe", [{"packing": "one_document"}, {"attend_across_documents": True}])
def test_a_window_does_not_change_the_rotation(model, corpus, make_set, recipe):
    recipe = {"context_size": 300, **recipe}
    whole = run(model, corpus, make_set([SITE], **recipe))
    some = run(model, corpus, make_set([SITE], window=TokenWindow(start=1, end=9), **recipe))
    place = {key: row for row, key in enumerate(zip(whole["document"], whole["position"], strict=True))}
    rows = [place[key] for key in zip(some["document"], some["position"], strict=True)]

    assert len(rows) == 8 * len(LENGTHS)
    assert np.abs(some[SITE] - whole[SITE][rows]).max() < 1e-4 * np.abs(whole[SITE]).max()
