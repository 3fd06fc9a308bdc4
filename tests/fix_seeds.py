"""The models that the project's seeds name: their published configs, narrow and with few layers, and their tokenizers.

A config is written to disk as its authors wrote it, with the spellings of its time. Only sizes and token ids are
changed: widths are an eighth, and the vocabulary is the tiny tokenizer's.
"""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

import json

N_LAYERS = 3
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
}
_PHI_2 = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
}
# Name: (published config without vocabulary and token ids, kind of tokenizer).
SEEDS = {
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        "GPT2Tokenizer",
    ),
    "pythia-410m": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_parallel_residual": True,
        },
        "GPTNeoXTokenizer",
    ),
    "opt-350m": (
        {
            "_remove_final_layer_norm": False,
            "activation_dropout": 0.0,
            "activation_function": "relu",
            "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0,
            "do_layer_norm_before": False,
            "dropout": 0.1,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "init_std": 0.02,
            "layerdrop": 0.0,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "prefix": "</s>",
            "torch_dtype": "float16",
            "use_cache": True,
            "word_embed_proj_dim": 512,
        },
        "GPT2Tokenizer",
    ),
    "deepseek-coder-1.3b": (
        {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "max_position_embeddings": 16384,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "rope_theta": 100000,
            "torch_dtype": "bfloat16",
        },
        "GPT2Tokenizer",  # A byte-level tokenizer.json, under the class name LlamaTokenizerFast.
    ),
    "starcoder2-3b": (
        {
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.1,
            "attention_softmax_in_fp32": True,
            "embedding_dropout": 0.1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 3072,
            "initializer_range": 0.018042,
            "intermediate_size": 12288,
            "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 16384,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "num_attention_heads": 24,
            "num_hidden_layers": 30,
            "num_key_value_heads": 2,
            "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813,
            "sliding_window": 4096,
            "use_bias": True,
            "use_cache": True,
        },
        "GPT2Tokenizer",
    ),
    "codellama-7b": (
        {**_LLAMA, "max_position_embeddings": 16384, "rope_theta": 1000000, "torch_dtype": "bfloat16"},
        "CodeLlamaTokenizer",
    ),
    "gemma-2b": (
        {
            "architectures": ["GemmaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 16384,
            "max_position_embeddings": 8192,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
        "GemmaTokenizer",
    ),
    "phi-2": (_PHI_2, "GPT2Tokenizer"),  # The repo names its tokenizer CodeGenTokenizer.
    "phi-2-instruct": ({**_PHI_2, "torch_dtype": "bfloat16"}, "GPT2Tokenizer"),
    "mistral-7b": (
        {
            "architectures": ["MistralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
        "LlamaTokenizer",
    ),
    "llama2-7b": ({**_LLAMA, "max_position_embeddings": 4096}, "LlamaTokenizer"),
}
_NARROWER = 8
_WIDTHS = ("hidden_size", "n_embd", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "head_dim")


def seed_config(name, **changes):
    """Returns the published config of a seed, narrow, with few layers."""
    config, _ = SEEDS[name]
    narrow = {key: config[key] // _NARROWER for key in _WIDTHS if key in config}
    layers = {"n_layer" if "n_layer" in config else "num_hidden_layers": N_LAYERS}
    return {**config, **narrow, **layers, **changes}


def save_tokenizer(kind, folder):
    """Saves a tokenizer of a class with the vocabulary of a few words; returns it."""
    import transformers

    byte_level = kind not in ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
    specials = ["<pad>", "<s>", "</s>", "<unk>"] if not byte_level else ["<|endoftext|>"]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if not byte_level else {}
    if kind == "GemmaTokenizer":
        specials, names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], {}
    if kind == "Qwen2Tokenizer":
        names = {"unk_token": None}
    from tokenizers.pre_tokenizers import ByteLevel

    space = "Ġ" if byte_level else "▁"
    merges = [(space, "t"), ("h", "e"), (f"{space}t", "he"), ("i", "n"), ("e", "r"), ("o", "u")]
    pieces = sorted(ByteLevel.alphabet()) if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [] if byte_level else ["▁", *(chr(code) for code in range(33, 127))]
    vocab = [*specials, *pieces, *("".join(pair) for pair in merges)]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(vocab))}
    tokenizer = getattr(transformers, kind)(vocab=ids, merges=merges, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_seed(name, folder):
    """Saves a seed with random weights: the config as published, weights and tokenizer; returns model and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = save_tokenizer(SEEDS[name][1], folder)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = seed_config(
        name, vocab_size=-(-len(tokenizer) // 64) * 64, **{k: v for k, v in ids.items() if v is not None}
    )
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    # transformers rewrites it in its own spelling.
    (folder / "config.json").write_text(json.dumps(config))
    return model, tokenizer
