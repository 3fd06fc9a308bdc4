"""Every architecture whose hookpoints are known: random weights, small configs, no download."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.gemma2 import modeling_gemma2

from fix_zoo import DECODERS, ZOO, random_model, zoo_batch, zoo_config, zoo_model
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.runner.hooks.binding import anatomy_of, bind, check_identity, offered_sites
from headrace_extractor.runner.hooks.capture import capture
from headrace_extractor.runner.passes.forward import forward_rows

N_LAYERS = 3
LENGTHS = (7, 20, 5, 17, 15)
NOT_ISOLATED = {"falcon-alibi"}


def pieces():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, length) for length in LENGTHS]


@torch.inference_mode()
def rows_of(name, documents, wanted=None, batch=1):
    model = zoo_model(name)
    sites = bind(model, wanted) if wanted else offered_sites(model)
    return forward_rows(model, zoo_batch(documents, batch=batch), sites)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def whole_pass(name, document):
    """transformers' own answer for one document, and the rows that each site captures of it."""
    model = zoo_model(name)
    ids = torch.from_numpy(document)[None]
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    rows = forward_rows(model, zoo_batch([document]), offered_sites(model))
    return model, out, rows


@pytest.mark.parametrize("name", ZOO)
def test_sublayers_add_up_to_the_residual_stream(name):
    model = zoo_model(name)
    check_identity(model)
    if name == "bert":
        return
    rows = rows_of(name, pieces()[:1])

    for layer in range(N_LAYERS):
        pre, attn, mlp, post = (
            rows[f"blocks.{layer}.hook_{site}"] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(pre + attn + mlp, post, rtol=0, atol=1e-5 * float(post.abs().max()))
        assert min(float(part.abs().max()) for part in (attn, mlp)) > 1e-3
        middle = rows.get(f"blocks.{layer}.hook_resid_mid")
        assert middle is None or relative(middle, pre + attn) < 1e-6


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sublayers_add_up_in_16_bits(name, dtype):
    check_identity(random_model(zoo_config(name), dtype))


@pytest.mark.parametrize("name", ZOO)
def test_residual_stream_is_what_transformers_calls_hidden_states(name):
    _, out, rows = whole_pass(name, pieces()[1])

    for layer in range(N_LAYERS):
        assert torch.equal(rows[f"blocks.{layer}.hook_resid_pre"], out.hidden_states[layer][0])
        if layer + 1 < N_LAYERS:
            assert torch.equal(rows[f"blocks.{layer}.hook_resid_post"], out.hidden_states[layer + 1][0])


@pytest.mark.parametrize("name", DECODERS)
def test_embedding_and_last_norm_are_the_models_own(name):
    model, out, rows = whole_pass(name, pieces()[1])
    family = anatomy_of(model).catalogue.family
    embedded = model.get_input_embeddings()(torch.from_numpy(pieces()[1]))
    if name == "bloom":
        embedded = model.word_embeddings_layernorm(embedded)
    norm = model.get_submodule(family.final)
    weight = getattr(norm, "weight", torch.ones(()))
    weight = 1 + weight if "gemma" in name else weight
    bias = getattr(norm, "bias", None)
    scaled = rows["ln_final.hook_normalized"] * weight + (0 if bias is None else bias)

    assert torch.equal(rows["hook_embed"], embedded)
    assert relative(scaled, out.last_hidden_state[0]) < 1e-5


@contextlib.contextmanager
def seen_by_attention():
    """Yields queries, keys, values `[B, H, S, d]` and results of each call of transformers' attention function."""
    seen, sdpa, eager = [], functional.scaled_dot_product_attention, modeling_gemma2.eager_attention_forward

    def by_sdpa(query, key, value, *args, **kwargs):
        result = sdpa(query, key, value, *args, **kwargs)
        seen.append((query, key, value, result.transpose(1, 2)))
        return result

    def by_eager(module, query, key, value, *args, **kwargs):
        result = eager(module, query, key, value, *args, **kwargs)
        seen.append((query, key, value, result[0]))
        return result

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", by_sdpa),
        mock.patch.object(modeling_gemma2, "eager_attention_forward", by_eager),
    ):
        yield seen


OWN_ATTENTION = ("bloom", "gpt_neo", "gptj")
BY_INTERFACE = tuple(name for name in DECODERS if name not in OWN_ATTENTION)


@pytest.mark.parametrize("name", BY_INTERFACE)
def test_heads_are_what_the_attention_function_sees(name):
    """Compares values and results at all positions; queries and keys at position 0, where they are not rotated."""
    model = zoo_model(name)
    network = anatomy_of(model).catalogue.network
    with seen_by_attention() as seen:
        rows = rows_of(name, pieces()[1:2])

    for layer, (query, key, value, result) in enumerate(seen):
        q, k, v, z = (rows[f"blocks.{layer}.attn.hook_{site}"] for site in "qkvz")
        if name == "olmo":
            q, k, v = (each.clamp(-0.2, 0.2) for each in (q, k, v))
        if name == "opt":
            q = q * network.d_head**-0.5
        n_repeats = value.shape[1] // network.n_kv_heads
        v = v.unflatten(-1, (network.n_kv_heads, network.d_head)).repeat_interleave(n_repeats, 1)
        assert torch.equal(v, value[0].transpose(0, 1))
        assert torch.equal(z, result[0].flatten(1))
        if not hasattr(attention_module(model, layer), "q_norm"):
            k = k.unflatten(-1, (network.n_kv_heads, network.d_head)).repeat_interleave(n_repeats, 1)
            assert torch.allclose(q[0], query[0, :, 0].flatten())
            assert torch.allclose(k[0], key[0, :, 0])
    assert len(seen) == N_LAYERS


def attention_module(model, layer):
    return next(m for n, m in anatomy_of(model).blocks[layer].named_children() if "attn" in n or "attention" in n)


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "olmo3", "qwen3", "qwen3_moe"])
def test_queries_and_keys_are_taken_before_their_norm(name):
    model = zoo_model(name)
    network = anatomy_of(model).catalogue.network
    with seen_by_attention() as seen:
        rows = rows_of(name, pieces()[1:2])

    for layer, (query, key, _, _) in enumerate(seen):
        q, k = rows[f"blocks.{layer}.attn.hook_q"], rows[f"blocks.{layer}.attn.hook_k"]
        if not name.startswith("olmo"):
            q = q.unflatten(-1, (network.n_heads, network.d_head))
            k = k.unflatten(-1, (network.n_kv_heads, network.d_head))
        attention = attention_module(model, layer)
        n_repeats = key.shape[1] // network.n_kv_heads
        k = attention.k_norm(k)[0].reshape(network.n_kv_heads, -1).repeat_interleave(n_repeats, 0)
        assert torch.allclose(attention.q_norm(q)[0].flatten(), query[0, :, 0].flatten())
        assert torch.allclose(k, key[0, :, 0])


def test_heads_of_models_with_attention_of_their_own():
    for name, split in (("gpt_neo", "attention._split_heads"), ("gptj", "_split_heads")):
        model, document = zoo_model(name), pieces()[1]
        rows = rows_of(name, [document])
        network = anatomy_of(model).catalogue.network
        for layer, block in enumerate(anatomy_of(model).blocks):
            attention = block.attn.attention if "." in split else block.attn
            normed = block.ln_1(rows[f"blocks.{layer}.hook_resid_pre"])
            for site, projection in zip("qkv", (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
                assert relative(rows[f"blocks.{layer}.attn.hook_{site}"], projection(normed)) < 1e-6
            projected = attention.out_proj(rows[f"blocks.{layer}.attn.hook_z"])
            assert relative(projected, rows[f"blocks.{layer}.hook_attn_out"]) < 1e-6
        assert rows["blocks.0.attn.hook_z"].shape[1] == network.n_heads * network.d_head


def test_heads_of_bloom_are_split_as_its_code_splits_them():
    model, document = zoo_model("bloom"), pieces()[1]
    rows = rows_of("bloom", [document])
    for layer, block in enumerate(model.h):
        normed = block.input_layernorm(rows[f"blocks.{layer}.hook_resid_pre"])[None]
        heads = block.self_attention._reshape(block.self_attention.query_key_value(normed))
        for site, values in zip("qkv", heads, strict=True):
            expected = values[0].transpose(0, 1).flatten(1)
            assert relative(rows[f"blocks.{layer}.attn.hook_{site}"], expected) < 1e-6
        projected = block.self_attention.dense(rows[f"blocks.{layer}.attn.hook_z"])
        assert relative(projected, rows[f"blocks.{layer}.hook_attn_out"]) < 1e-6


@pytest.mark.parametrize("name", DECODERS)
def test_mlp_neurons_are_before_and_behind_the_activation(name):
    model, document = zoo_model(name), pieces()[1]
    rows = rows_of(name, [document])
    activations = {}
    for layer, block in enumerate(anatomy_of(model).blocks):
        mlp = getattr(block, "mlp", block)
        found = [getattr(mlp, key) for key in ("act_fn", "act", "activation_fn", "gelu_impl") if hasattr(mlp, key)]
        if f"blocks.{layer}.mlp.hook_pre" not in rows:
            assert "moe" in name or name == "mixtral"
            continue
        activations[layer] = found[0]
        pre, post = rows[f"blocks.{layer}.mlp.hook_pre"], rows[f"blocks.{layer}.mlp.hook_post"]
        gated = "gate" in anatomy_of(model).points[f"blocks.{layer}.mlp.hook_pre"].module
        if not gated:
            assert relative(found[0](pre), post) < 1e-6
        else:
            linear = bind(model, [anatomy_of(model).points[f"blocks.{layer}.mlp.hook_post"].module])
            assert torch.equal(forward_rows(model, zoo_batch([document]), linear).popitem()[1], post)
            assert relative(found[0](pre) * _up(model, rows, layer), post) < 1e-5
    assert name == "mixtral" or activations


def _up(model, rows, layer):
    """Computes the linear half of a gated MLP from the residual stream in the middle of the block."""
    block = anatomy_of(model).blocks[layer]
    middle = rows[f"blocks.{layer}.hook_resid_mid"]
    norms = ("pre_feedforward_layernorm", "post_attention_layernorm")
    norm = next((getattr(block, key) for key in norms if hasattr(block, key)), None)
    olmo2 = anatomy_of(model).points[f"blocks.{layer}.hook_resid_mid"].module.endswith("mlp:in")
    entering = middle if olmo2 else norm(middle)
    if hasattr(block.mlp, "gate_up_proj"):
        return block.mlp.gate_up_proj(entering).chunk(2, -1)[1]
    return block.mlp.up_proj(entering)


@functools.cache
def alone(name):
    """Rows of each document by itself."""
    return [rows_of(name, [document]) for document in pieces()]


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_ISOLATED])
def test_packed_documents_do_not_see_one_another(name):
    for site, rows in rows_of(name, pieces()).items():
        assert relative(rows, torch.cat([each[site] for each in alone(name)])) < 1e-5, site


@pytest.mark.parametrize("name", ["bert", "bloom", "falcon", "gemma2", "gpt2", "gpt_neo", "llama", "mistral", "opt"])
def test_every_sequence_of_a_batch_is_isolated_on_its_own(name):
    packed = rows_of(name, [*pieces(), *pieces()[::-1]], batch=2)

    for site, rows in packed.items():
        assert relative(rows, torch.cat([each[site] for each in [*alone(name), *alone(name)[::-1]]])) < 1e-5, site


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_ISOLATED])
def test_documents_in_one_sequence_see_one_another_when_they_may(name):
    """The comparison in the test above would fail by far without isolation."""
    joined = np.concatenate(pieces())
    last = [f"blocks.{N_LAYERS - 1}.hook_resid_post"]
    together = rows_of(name, [joined], last)[last[0]]
    apart = torch.cat([each[last[0]] for each in alone(name)])

    assert relative(together[: LENGTHS[0]], apart[: LENGTHS[0]]) < 1e-5 or name == "bert"
    assert relative(together[LENGTHS[0] :], apart[LENGTHS[0] :]) > 1e-2


@pytest.mark.parametrize("name", sorted(NOT_ISOLATED))
def test_documents_that_can_not_be_kept_apart_are_refused(name):
    with pytest.raises(FieldInvalid, match="one_document"):
        rows_of(name, pieces())
    rows_of(name, pieces()[:1])


@pytest.mark.parametrize("name", ["bloom", "falcon", "falcon-serial", "opt", "llama"])
def test_eager_attention_isolates_too(name):
    model = random_model(zoo_config(name), attention="eager")
    sites = bind(model, [f"blocks.{N_LAYERS - 1}.hook_resid_post"])
    packed = forward_rows(model, zoo_batch(pieces()), sites).popitem()[1]
    single = [forward_rows(model, zoo_batch([document]), sites).popitem()[1] for document in pieces()]

    assert relative(packed, torch.cat(single)) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_a_site_does_not_depend_on_which_others_are_taken(name):
    """Also if the network changes the tensor in place later."""
    document, together = pieces()[1:2], alone(name)[1]

    for site, rows in together.items():
        if site.startswith(("blocks.1.", "hook_embed", "ln_final")):
            assert torch.equal(rows_of(name, document, [site])[site], rows), site


@pytest.mark.parametrize("name", ["falcon", "opt", "gpt_neox", "gemma2", "qwen2_moe", "bloom"])
def test_the_pass_stops_behind_the_deepest_site(name):
    model, calls = zoo_model(name), []
    blocks = anatomy_of(model).blocks
    handles = [b.register_forward_pre_hook(lambda _m, _a, n=n: calls.append(n)) for n, b in enumerate(blocks)]
    try:
        rows_of(name, pieces()[:1], ["blocks.1.attn.hook_z", "blocks.0.hook_resid_post", "hook_embed"])
    finally:
        for handle in handles:
            handle.remove()

    assert calls == [0, 1]


def test_a_site_that_does_not_fire_is_an_error():
    model = random_model(zoo_config("llama"))
    (site,) = bind(model, ["blocks.1.mlp.hook_post"])
    model.layers[1].mlp.forward = lambda hidden: hidden

    with pytest.raises(RuntimeError, match=r"did not pass blocks\.1\.mlp\.hook_post"), capture([site]):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
