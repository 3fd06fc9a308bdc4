from __future__ import annotations

import pytest

from headrace_extractor.corpora.recipe import Recipe, TokenWindow
from headrace_extractor.models import ModelInfo
from headrace_extractor.sets.identity import identity_of
from headrace_extractor.sets.spec import ExtractionSpec
from headrace_log.manifest import set_id_of

MODEL = ModelInfo(
    id="tiny",
    source="folder",
    commit_sha="sha256:1",
    quantization="none",
    load_options={},
    ready=True,
    model_type="llama",
    n_layers=4,
    d_model=32,
    context_window=512,
    weight_bytes=1,
    files_path="/x",
    tokenizer_digest="t",
)
OLD = {
    "context_size": 1024,
    "packing": "one_document",
    "attend_across_documents": True,
    "bos": "none",
    "eos": "document",
    "drop_special_tokens": True,
    "drop_first_positions": 3,
    "batch_size": 8,
    "storage_dtype": "bfloat16",
}


def set_id(recipe, **more):
    spec = ExtractionSpec(
        model_id="tiny", corpus_id="c", hookpoints=("blocks.1.hook_resid_post",), recipe=Recipe.from_json(recipe)
    )
    return set_id_of(identity_of(spec, MODEL, corpus_digest="d" * 64, compute_dtype="float32", **more))


@pytest.mark.parametrize(
    ("recipe", "known"),
    [
        ({}, "85ddc32b205ee37ef93af5a91d0ee8ef"),
        ({"bos": "document"}, "bbdd0b7c0ba0acb931d98f8930d1a8df"),
        (OLD, "40fa5284ad388fd7c82808b32b44459f"),
    ],
)
def test_sets_made_before_there_were_windows_templates_and_tokens_of_the_tokenizer_keep_their_id(recipe, known):
    assert set_id(recipe) == known


def test_what_a_packing_does_by_default_may_be_spelled_out():
    assert set_id({"long_documents": "split", "window": None}) == set_id({})
    assert set_id(OLD | {"long_documents": "truncate", "window": {"start": 0, "end": 0}}) == set_id(OLD)


def test_every_later_choice_makes_another_set():
    ids = [
        set_id({}),
        set_id({"bos": "document"}),
        set_id({"bos": "none"}),
        set_id({"long_documents": "truncate"}),
        set_id({"window": {"start": -1}}),
        set_id({"window": {"start": 0, "end": -1}}),
        set_id({"chat_template": True}, chat_template_digest="a"),
        set_id({"chat_template": True}, chat_template_digest="b"),
        set_id(OLD | {"long_documents": "split"}),
        set_id({"max_documents": 3}),
        set_id({"max_documents": 4}),
    ]

    assert len(set(ids)) == len(ids)


def test_a_window_is_written_and_read_as_it_is():
    recipe = Recipe(window=TokenWindow(start=-3, end=-1), long_documents="truncate")

    assert Recipe.from_json(recipe.to_json()) == recipe
