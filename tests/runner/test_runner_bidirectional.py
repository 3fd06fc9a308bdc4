"""Configs that make an encoder of a decoder: tokens see later tokens of their document, and still no other document."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fix_runner import documents, load, run_command, save_model
from fix_zoo import DECODERS, random_model, zoo_batch, zoo_config
from headrace_extractor.corpora.recipe import TokenWindow
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.node.runner_protocol import Extract
from headrace_extractor.runner.hooks.binding import anatomy_of, bind
from headrace_extractor.runner.passes import samples
from headrace_extractor.runner.passes.forward import forward_rows

SITE = "blocks.2.hook_resid_post"
PIECES = [np.arange(3, 20), np.arange(30, 52)[::-1].copy(), np.arange(60, 70)]
# A mask that the runner passes would undo the layers' windows: no way is left to keep documents apart.
WINDOWS = {"gemma2", "gemma3", "gpt_neo", "ministral", "mistral", "olmo3"}
NOT_ISOLATED = {*WINDOWS, "falcon-alibi"}


def rows(model, pieces):
    return forward_rows(model, zoo_batch(pieces), bind(model, [SITE]))[SITE]


@pytest.mark.parametrize("name", DECODERS)
def test_documents_of_a_decoder_that_is_no_longer_causal_stay_apart_or_are_refused(name):
    model = random_model(zoo_config(name, is_causal=False))
    alone = [rows(model, [piece]) for piece in PIECES]

    assert not anatomy_of(model).causal
    if name in NOT_ISOLATED:
        with pytest.raises(FieldInvalid, match="one_document"):
            rows(model, PIECES)
    else:
        torch.testing.assert_close(rows(model, PIECES), torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_documents_of_a_gemma_that_looks_both_ways_stay_apart_or_are_refused(name):
    """Gemma 1 and 2 make causal masks in spite of their config: a row would depend on whether its pass needs one."""
    model = random_model(zoo_config(name, use_bidirectional_attention=True))
    if name == "gemma3":
        alone = torch.cat([rows(model, [piece]) for piece in PIECES])
        torch.testing.assert_close(rows(model, PIECES), alone, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(FieldInvalid, match="one_document"):
            rows(model, PIECES)


@pytest.mark.parametrize("name", ["llama", "falcon", "bloom"])
def test_eager_attention_keeps_them_apart_too(name):
    model = random_model(zoo_config(name, is_causal=False), attention="eager")

    alone = torch.cat([rows(model, [piece]) for piece in PIECES])
    torch.testing.assert_close(rows(model, PIECES), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"), [("gemma3", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})]
)
@pytest.mark.parametrize("recipe", [{}, {"packing": "one_document"}, {"window": TokenWindow(end=9)}])
def test_rows_that_depend_on_the_whole_document_agree_with_the_whole(
    name, changes, recipe, tmp_path, make_set, make_corpus
):
    config = zoo_config(name, max_position_embeddings=512, **changes)
    model = load(save_model(AutoModelForCausalLM.from_config, config, tmp_path / "model"))
    texts = [text for text in documents(12, longest=500) if len(text) > samples.MAX_TOKENS]
    folder = make_set([SITE], context_size=512, batch_size=1, **recipe)
    run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(make_corpus(texts))), model)

    (entry,) = json.loads((folder / "manifest.json").read_text())["receipt"].values()
    assert entry["rows"] > 0
    assert entry["max_relative_error"] < 1e-4
