from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fix_extractor import model_info
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.hookpoints.catalogue import catalogue_of
from headrace_extractor.sets.identity import identity_of, new_manifest
from headrace_extractor.sets.spec import ExtractionSpec
from headrace_log.layout import ColumnSpec, Dtype

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture
def model(tmp_path):
    def make(model_type):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": model_type}))
        return replace(model_info(tmp_path), model_type=model_type)  # As the registry has read it.

    return make


def spec(*hookpoints):
    return ExtractionSpec(model_id="tiny", corpus_id="docs", hookpoints=hookpoints, recipe=Recipe())


def identity(model):
    return identity_of(spec(), model, corpus_digest="c", compute_dtype="float32")


def test_eager_attention_that_a_family_needs_is_part_of_the_identity(model):
    assert identity(model("gemma2"))["load_options"] == {"attn_implementation": "eager", "dtype": "float32"}
    assert identity(model("llama"))["load_options"] == {"dtype": "float32"}


def test_columns_of_heads_have_their_shape(model):
    names = ("blocks.1.attn.hook_k", "blocks.1.hook_resid_post")
    manifest = new_manifest(spec(*names), {"made": "here"}, catalogue_of(model("llama")).shapes(names))

    assert manifest.column(names[0]).shape == (2, 8)
    assert manifest.column(names[0]).width == 16
    assert manifest.column(names[1]).shape == ()
    assert manifest.column(names[1]).width == 32


def test_a_columns_shape_is_kept_in_the_manifest_and_must_fit_its_width():
    column = ColumnSpec(name="blocks.1.attn.hook_k", dtype=Dtype.FLOAT32, width=16, shape=(2, 8))

    assert ColumnSpec.from_json(json.loads(json.dumps(column.to_json()))) == column
    with pytest.raises(ValueError, match="not 16 elements"):
        ColumnSpec(name="x", dtype=Dtype.FLOAT32, width=16, shape=(3, 8))
