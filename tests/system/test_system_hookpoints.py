"""Hookpoints by any spelling, through the real services: canonical names, shapes and the right numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fix_system import MODEL, N_LAYERS, texts
from headrace_client import errors

pytestmark = pytest.mark.timeout(240)

Z = "blocks.1.attn.hook_z"
K = "blocks.1.attn.hook_k"
ATTN_OUT = "blocks.1.hook_attn_out"
UP = "layers.1.mlp.up_proj:out"
MIDDLE = "blocks.1.hook_resid_mid"
ASKED = ["blocks.1.attn.o.hook_in", "blocks.1.attn.hook_k", "model.layers.1.self_attn:out", f"model.{UP}"]


def rows_of(system, extraction, columns):
    parts = {name: [] for name in columns}
    with system.client.chunks(extraction, columns) as chunks:
        shapes = {column.name: column.shape for column in chunks.header.columns}
        for chunk in chunks:
            for name, values in chunk.arrays.items():
                parts[name].append(values.copy())
    return {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}, shapes


def test_any_spelling_gives_the_canonical_column_with_its_shape_and_numbers(system, text_llama):
    corpus_id = system.variant(texts(20, seed=3))
    extraction = system.client.extractions.start(MODEL, corpus_id, [*ASKED, "blocks.1-1.ln2.hook_in"])
    assert extraction.hookpoints == (K, Z, ATTN_OUT, MIDDLE, UP)

    rows, shapes = rows_of(system, extraction, extraction.hookpoints)
    block = AutoModel.from_pretrained(text_llama, dtype=torch.float32).layers[1]
    heads = block.self_attn.config.num_attention_heads, block.self_attn.head_dim
    assert shapes[Z] == heads
    assert shapes[K] == (block.self_attn.config.num_key_value_heads, heads[1])
    assert shapes[ATTN_OUT] == ()
    with torch.inference_mode():
        torch.testing.assert_close(block.self_attn.o_proj(rows[Z]), rows[ATTN_OUT])
        torch.testing.assert_close(block.mlp.up_proj(block.post_attention_layernorm(rows[MIDDLE])), rows[UP])


def test_another_spelling_of_the_same_is_a_read(system):
    corpus_id = system.variant(texts(20, seed=4))
    first = system.client.extractions.start(MODEL, corpus_id, "blocks.*.hook_resid_post")
    rows_of(system, first, first.hookpoints)
    again = system.client.extractions.start(MODEL, corpus_id, [f"blocks.0-{N_LAYERS - 1}.hook_out", "layers.0:out"])

    assert again.hookpoints == first.hookpoints == tuple(f"blocks.{n}.hook_resid_post" for n in range(N_LAYERS))
    assert again.set_id == first.set_id


def test_hookpoints_are_listed_with_shape_and_module(system):
    points = {point.name: point for point in system.client.hookpoints(MODEL)}

    assert points[K].module == "layers.1.self_attn.k_proj:out"
    assert points[K].shape == (points[K].width // points[Z].shape[1], points[Z].shape[1])
    assert next(iter(points)) == "hook_embed"
    assert not any(point.unavailable for point in points.values())


@pytest.mark.parametrize("name", ["blocks.1.hook_q", f"blocks.{N_LAYERS}.hook_out", "layers.1.mlp.act_fn:out"])
def test_what_is_not_there_is_refused_before_any_work(system, name):
    corpus_id = system.variant(texts(2, seed=5))
    with pytest.raises(errors.HookpointNotFound) as caught:
        system.client.extractions.start(MODEL, corpus_id, ["blocks.0.hook_resid_post", name])

    assert "blocks." in str(caught.value)
