from __future__ import annotations

import pytest
import torch
from fix_runner import N_LAYERS, VOCAB_SIZE, WIDTH, load
from transformers import (
    AutoModel,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from extractor_service.errors import HookpointNotFound, ModelUnsupported, NotImplementedYet
from extractor_service.hookpoints import SITES
from extractor_service.runner.hookpoints import check_identity, offered_sites, resolve

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def random_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_hookpoints_are_listed_in_forward_order(tiny_model):
    sites = offered_sites(load(tiny_model).model)

    assert [site.name for site in sites] == [f"blocks.{layer}.{site}" for layer in range(N_LAYERS) for site in SITES]


def test_wanted_hookpoints_come_in_forward_order(tiny_model):
    wanted = ["blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out"]

    assert [site.name for site in resolve(load(tiny_model).model, wanted)] == wanted[::-1]


@pytest.mark.parametrize("name", ["blocks.4.hook_resid_post", "blocks.1.hook_resid_mid", "model.layers.1"])
def test_unknown_hookpoint_names_the_nearest(tiny_llama, name):
    with pytest.raises(HookpointNotFound) as caught:
        resolve(load(tiny_llama).model, [name])

    assert caught.value.metadata["nearest"].startswith("blocks.")


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_holds_in_models_shaped_like_llama(config, dtype):
    check_identity(random_model(config(**SHAPE), dtype))


def test_residual_stream_alone_is_offered_where_sublayers_are_normed_behind():
    model = random_model(Gemma2Config(**SHAPE, head_dim=8))
    check_identity(model)

    assert {site.name.split(".")[2] for site in offered_sites(model)} == {"hook_resid_pre", "hook_resid_post"}
    with pytest.raises(NotImplementedYet, match="normalise"):
        resolve(model, ["blocks.0.hook_mlp_out"])


def test_scaled_residual_passing_for_llama_is_refused():
    model = random_model(GraniteConfig(**SHAPE, residual_multiplier=0.5))
    model.config.model_type = "llama"

    with pytest.raises(ModelUnsupported, match="do not add up"):
        check_identity(model)


def test_architecture_without_known_hookpoints_is_refused():
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}

    with pytest.raises(ModelUnsupported, match="GPTNeoXModel"):
        check_identity(random_model(GPTNeoXConfig(**shape)))
