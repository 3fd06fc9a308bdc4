"""Small configs of every architecture whose hookpoints are known, and models of them with random weights."""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

import functools
from types import SimpleNamespace

N_TOKENS_ZOO = 97
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MANY = {**_LLAMA, "num_key_value_heads": 4}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}

# Name in the tests: (model type, settings).
ZOO = {
    "arcee": ("arcee", _LLAMA),
    "bert": ("bert", _NEOX),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("falcon", {**_FALCON, "alibi": False}),
    "falcon-alibi": ("falcon", {**_FALCON, "alibi": True, "parallel_attn": False, "multi_query": False}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-serial": ("falcon", {**_FALCON, "parallel_attn": False, "multi_query": False}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**_LLAMA, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 8, "pad_token_id": 0}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": (
        "gpt_neo",
        {
            **{key: value for key, value in _NEOX.items() if key not in ("num_attention_heads", "num_hidden_layers")},
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 8,
        },
    ),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-serial": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "granite": ("granite", {**_LLAMA, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
    "helium": ("helium", {**_LLAMA, "head_dim": 8}),
    "llama": ("llama", _LLAMA),
    "ministral": ("ministral", {**_LLAMA, "head_dim": 8, "sliding_window": 16}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 16}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4}),
    "olmo": ("olmo", {**_LLAMA, "clip_qkv": 0.2}),
    "olmo2": ("olmo2", _LLAMA),
    "olmo3": ("olmo3", {**_LLAMA, "sliding_window": 16}),
    "opt": (
        "opt",
        {
            **{key: value for key, value in _NEOX.items() if key != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
    ),
    "phi": ("phi", _MANY),
    "phi3": ("phi3", {**_LLAMA, "pad_token_id": 0}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2_moe": (
        "qwen2_moe",
        {**_LLAMA, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    ),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, **_EXPERTS, "head_dim": 16, "num_experts": 4, "mlp_only_layers": [1]}),
    "seed_oss": ("seed_oss", {**_LLAMA, "head_dim": 8}),
    "smollm3": ("smollm3", {**_LLAMA, "pad_token_id": 0}),
    "starcoder2": ("starcoder2", _LLAMA),
}
DECODERS = tuple(name for name in ZOO if name != "bert")


def zoo_config(name, **changes):
    from transformers import AutoConfig

    model_type, settings = ZOO[name]
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{"vocab_size": N_TOKENS_ZOO, **special, **settings, **changes})


def random_model(config, dtype=None, attention=None):
    """Returns a base model with weights of ordinary size: default ones are so small that attention hardly matters."""
    import torch
    from transformers import AutoModel

    from headrace_extractor.runner.models.load_options import attention_of, supports_sdpa

    torch.manual_seed(0)
    options = {"attn_implementation": attention} if attention else {}
    chosen = attention_of(options, supports_sdpa=supports_sdpa(config))
    model = AutoModel.from_config(config, dtype=dtype or torch.float32, attn_implementation=chosen).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(requires_grad=False)


@functools.cache
def zoo_model(name):
    """Returns the model of a name, made once; no test may change it."""
    return random_model(zoo_config(name))


def zoo_batch(pieces, *, batch=1):
    """Packs documents into `batch` equal sequences, with token ids and position ids as the packer makes them."""
    import numpy as np

    tokens = np.concatenate(pieces).astype(np.int32).reshape(batch, -1)
    positions = np.concatenate([np.arange(len(piece)) for piece in pieces]).astype(np.int32).reshape(batch, -1)
    return SimpleNamespace(token_ids=tokens, position_ids=positions)
