from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig

from fix_runner import N_LAYERS, load
from fix_zoo import random_model, zoo_config, zoo_model
from headrace_extractor.errors import FieldInvalid, HookpointNotFound, ModelUnsupported
from headrace_extractor.hookpoints.catalogue import SITES
from headrace_extractor.runner.hooks.binding import bind, check_identity, offered_sites
from headrace_extractor.runner.hooks.capture import capture


def test_hookpoints_are_listed_in_forward_order(tiny_model):
    sites = [site.name for site in offered_sites(load(tiny_model).model)]

    assert sites[1:-1] == [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in SITES]
    assert (sites[0], sites[-1]) == ("hook_embed", "ln_final.hook_normalized")


def test_wanted_hookpoints_are_found(tiny_model):
    wanted = ["blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"]

    assert [site.name for site in bind(load(tiny_model).model, wanted)] == wanted


@pytest.mark.parametrize("name", ["blocks.4.hook_resid_post", "blocks.1.hook_nothing", "model.layers.1"])
def test_unknown_hookpoint_names_the_nearest(tiny_llama, name):
    with pytest.raises(HookpointNotFound) as caught:
        bind(load(tiny_llama).model, [name])

    assert caught.value.metadata["nearest"].startswith("blocks.")


def test_any_module_that_has_a_row_for_each_token_can_be_named(tiny_llama):
    model = load(tiny_llama).model
    names = ["layers.1.mlp.up_proj:out", "layers.1.self_attn.q_proj:in", "norm:out"]
    with torch.inference_mode(), capture(bind(model, names)) as captured:
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)

    assert [tuple(captured[name].shape) for name in names] == [(1, 3, 64), (1, 3, 32), (1, 3, 32)]


def test_a_module_whose_tensor_is_no_rows_is_refused():
    model = zoo_model("gemma3")  # The model's norm of queries is given [batch, heads, tokens, width].

    with pytest.raises(ModelUnsupported, match="no row"):
        bind(model, ["layers.1.self_attn.q_norm:out"])
    with pytest.raises(HookpointNotFound):
        bind(model, ["layers.1.self_attn.absent:out"])


def test_scaled_residual_passing_for_llama_is_refused():
    model = random_model(zoo_config("granite"))
    model.config.model_type = "llama"

    with pytest.raises(ModelUnsupported, match="do not add up"):
        check_identity(model)


def test_config_that_does_not_fit_the_code_is_refused():
    model = random_model(zoo_config("llama"))
    model.config.num_key_value_heads = 4

    with pytest.raises(ModelUnsupported, match=r"hook_k is 32 wide .* and 16 in the model"):
        check_identity(model)


def test_sublayers_of_a_post_norm_opt_are_refused_with_the_reason():
    model = random_model(zoo_config("opt", do_layer_norm_before=False))
    check_identity(model)

    with pytest.raises(HookpointNotFound, match="normalise the residual stream itself"):
        bind(model, ["blocks.1.hook_mlp_out"])


def test_sdpa_asked_for_where_there_is_none_is_refused():
    with pytest.raises(FieldInvalid, match="eager is used"):
        random_model(zoo_config("gemma2"), attention="sdpa")


def test_eager_is_chosen_only_where_sdpa_can_not_compute_it():
    chosen = {name: zoo_model(name).config._attn_implementation for name in ("gemma2", "gpt_neo", "gptj", "bloom")}

    assert set(chosen.values()) == {"eager"}
    assert zoo_model("llama").config._attn_implementation == "sdpa"
    assert random_model(GPTNeoXConfig(**NEOX)).config._attn_implementation == "sdpa"


NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
