"""Hookpoints against TransformerLens, which is installed with SAELens: same weights, same names, same numbers.

HookedTransformer has code of its own for converted weights; its bridge hooks transformers' own modules.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fix_zoo import zoo_batch, zoo_config
from headrace_extractor.hookpoints.names import aliases_of
from headrace_extractor.runner.hooks.binding import anatomy_of, offered_sites
from headrace_extractor.runner.models.load_options import supports_sdpa
from headrace_extractor.runner.passes.forward import forward_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.pretrained import weight_conversions

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

SHAPE = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_ctx": 64, "d_vocab": 97, "dtype": torch.float32}
ROTARY = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "rotary_base": 10_000}
RMS = {"normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "n_key_value_heads": 2, "eps": 1e-6}
CONFIGS = {
    "gpt2": {"d_head": 8, "d_mlp": 128, "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5},
    "gpt_neox": {
        **ROTARY,
        "d_head": 8,
        "d_mlp": 48,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "eps": 1e-5,
        "rotary_dim": 2,
        "parallel_attn_mlp": True,
    },
    "llama": {**ROTARY, **RMS, "d_head": 8, "d_mlp": 48, "act_fn": "silu", "rotary_dim": 8},
    "gemma2": {
        **ROTARY,
        **RMS,
        "d_head": 16,
        "d_mlp": 48,
        "act_fn": "gelu_pytorch_tanh",
        "rotary_dim": 16,
        "window_size": 16,
        "use_local_attn": True,
        "attn_types": ["local", "global", "local"],
        "attn_scores_soft_cap": 50.0,
        "use_normalization_before_and_after": True,
    },
}
CONVERSIONS = {"gpt2": "gpt2", "gpt_neox": "neox", "llama": "llama", "gemma2": "gemma"}


def random_causal_lm(config, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(requires_grad=False)


@functools.cache
def both(name):
    """The same random weights in transformers and in TransformerLens."""
    config = zoo_config(name)
    model = random_causal_lm(config, "sdpa" if supports_sdpa(config) else "eager")
    lens = HookedTransformer(HookedTransformerConfig(**SHAPE, **CONFIGS[name], device="cpu"))
    convert = getattr(weight_conversions, f"convert_{CONVERSIONS[name]}_weights")
    lens.load_state_dict(convert(model, lens.cfg), strict=False)
    return model.base_model, lens.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shared_hook_has_the_same_numbers(name):
    model, lens = both(name)
    document = np.random.default_rng(1).integers(3, 97, 24)
    rows = forward_rows(model, zoo_batch([document]), offered_sites(model))
    with torch.inference_mode():
        _, cache = lens.run_with_cache(torch.from_numpy(document)[None])

    points = anatomy_of(model).points
    assert {site for site in rows if site not in cache} == set()
    for site, found in rows.items():
        expected = cache[site][0]
        assert tuple(expected.shape[1:]) == points[site].shape, site
        torch.testing.assert_close(
            found,
            expected.flatten(1),
            rtol=1e-4,
            atol=1e-5 * float(expected.abs().max()),
            msg=lambda m, s=site: f"{s}: {m}",
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformer_lens_has_not_is_not_offered(name):
    model, lens = both(name)
    missing = [site for site, point in anatomy_of(model).points.items() if point.unavailable]

    assert not set(missing) & set(lens.hook_dict)
    assert bool(missing) == (name == "gpt_neox")


BRIDGED = (
    *(
        "bloom",
        "falcon",
        "falcon-serial",
        "gemma",
        "gemma2",
        "gemma3",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
    ),
    *("llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "starcoder2"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer, which the bridge demands and loads again from its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0").save_pretrained(
        folder
    )
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BRIDGED)
def test_names_and_other_spellings_mean_what_they_mean_in_the_bridge(name, tokenizer):
    model = random_causal_lm(zoo_config(name), "eager")
    model.config.architectures = [type(model).__name__]
    document = np.arange(3, 20)
    rows = forward_rows(model.base_model, zoo_batch([document]), offered_sites(model.base_model))
    catalogue = anatomy_of(model.base_model).catalogue
    bridge = TransformerBridge.boot_transformers("a/model", hf_model=model, tokenizer=tokenizer)
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(torch.from_numpy(document)[None])

    assert {site for site in rows if site not in cache} == set()
    spelled = {site: site for site in rows} | aliases_of(catalogue.family, catalogue.network.n_layers)
    compared = {spelling: target for spelling, target in spelled.items() if target in rows and spelling in cache}
    assert len(compared) >= 2 * len(rows) - 8
    for spelling, target in compared.items():
        expected = cache[spelling].reshape(rows[target].shape)
        torch.testing.assert_close(
            rows[target],
            expected,
            rtol=1e-4,
            atol=1e-5 * float(expected.abs().max()),
            msg=lambda m, s=spelling: f"{s}: {m}",
        )
