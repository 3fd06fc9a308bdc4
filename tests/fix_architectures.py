"""Small random models of every text architecture that the installed transformers knows, by one table of sizes.

The settings that a config class has are shrunk by name; `_OWN` adds the settings in which an architecture differs. The
weights of norms, biases and state spaces are random too, so that a missing or misplaced one shows.
"""

# ruff: noqa: PLC0415 -- torch is imported by the tests that need it, not by every run

from __future__ import annotations

import functools

N_TOKENS = 97
N_LAYERS = 4  # Hybrids have full attention in every fourth block.
N_SEQUENCE = 48  # Tokens in a sequence; `documents` fill two of them.
WINDOW = 8  # Of every window, chunk and scale that a config knows.
_NOISE = 0.2
_MAX_PARAMETERS = 5_000_000

_SMALL = {
    **dict.fromkeys(("vocab_size", "ngram_vocab_size_base", "emb_vocab_size"), N_TOKENS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "dim_model_base"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers"),
        N_LAYERS,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "index_n_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dim_ff", "dff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
            *("shared_experts_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
            *("prefix_dense_intermediate_size", "dense_intermediate_size"),
        ),
        24,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "n_group", "topk_group"), 2),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "gated_norm_rank", "hc_lowrank"), 16
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(
        (
            *("sliding_window", "attention_chunk_size", "local_attention", "window_size", "attention_window_size"),
            *("floor_scale", "sliding_window_size", "log_scaling_n_floor", "keep_window_size", "index_topk"),
            *("chunk_size", "mamba_chunk_size", "rel_extent", "block_size"),
        ),
        WINDOW,
    ),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "rotary_dim"), 4),
    **dict.fromkeys(("query_pre_attn_scalar", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    "pad_token_id": 0,
    "num_buckets": 4,
    "index_topk_blocks": 2,
    "index_block_size": 4,
    # Of the towers for pictures and sound, which no text enters.
    **dict.fromkeys(("depth", "num_global_layers"), 1),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
    **dict.fromkeys(("image_token_id", "image_token_index"), 90),
    **dict.fromkeys(("video_token_id", "video_token_index"), 91),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), 92),
    "router_hidden_size": 16,
    "type_vocab_size": 2,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_ssm": 64}
_HYBRID = ["linear_attention"] * 3 + ["full_attention"]
_OWN = {
    "mamba2": {"num_heads": 8, "expand": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA2,
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_expand": 2,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "hrm_text": {"num_layers_per_stack": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": N_TOKENS,
        "hidden_size_per_layer_input": 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": N_TOKENS,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
    },
    "glm4v_moe_text": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "luke": {"entity_vocab_size": 7, "entity_emb_size": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 8], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), N_TOKENS),
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
    },
    "zamba2": {
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
    },
    "qwen2_vl": {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "neomme": {"head_dim": 16},
}
# Their positions have three axes, which share the frequencies.
_THREE_AXES = frozenset(
    {
        *("glm46v_text", "glm4v_moe_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text"),
        *("qwen2_5_vl_text", "qwen2_vl_text"),
    }
)
# Sizes of these are not told by names alone, or their code needs libraries that are not installed.
LEFT_OUT = frozenset(
    {
        *("chameleon", "cohere2_vision", "cosmos3_edge", "deepseek_ocr2", "deepseek_vl_hybrid", "dots3_note"),
        *(
            "dots3_note_text",
            "ernie4_5_vl_moe",
            "emu3",
            "evolla",
            "fast_vlm",
            "florence2",
            "gemma4_unified",
            "glm5_next",
        ),
        *(
            "glm5_next",
            "granite4_vision",
            "granite_speech",
            "granite_speech_plus",
            "hunyuan_vl",
            "idefics",
            "inkling2",
            "janus",
            "kosmos-2",
            "kosmos-2.5",
        ),
        *(
            "molmo2",
            "muse_glimmer",
            "muse_spark",
            "nemo_speechlm",
            "perception_lm",
            "qwen4_exp",
            "qwen4_exp_text",
            "unlimited_ocr",
            "vibevoice_asr",
        ),
    }
)


def model_types():
    """Lists the model types that have a language model: causal, masked, multimodal, or from text to text."""
    from transformers.models.auto import modeling_auto as auto

    kinds = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    names = {name for kind in kinds for name in kind if name in auto.MODEL_MAPPING_NAMES}
    return tuple(sorted(names - LEFT_OUT))


def small_config(model_type, **changes):
    """Returns a small config of a model type; `changes` are settings of their own."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **_settings(model_type, changes))


def _settings(model_type, changes=None):
    """Returns the settings of a small config; those of pictures and sound beside its text are small too."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = CONFIG_MAPPING[model_type]
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    settings = {name: value for name, value in _SMALL.items() if name in known}
    if model_type in _THREE_AXES:
        sections = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10_000.0}
        settings["rope_parameters"] = sections
    if "kv_lora_rank" in known:  # Its keys are made per head, from a latent that heads share.
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, part in kind.sub_configs.items():
        inner = getattr(kind(), name, None)
        part_type = getattr(inner, "model_type", "") if part is AutoConfig else part.model_type
        if part_type in CONFIG_MAPPING:
            settings[name] = {"model_type": part_type, **_settings(part_type)}
    return {**settings, **_OWN.get(model_type, {}), **(changes or {})}


def random_model(config):
    """Returns the model of a config with its head, as files in a hub hold it, with noise in every weight."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    torch.manual_seed(0)
    kinds = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    with torch.device("meta"):
        n_parameters = kind.from_config(config).num_parameters()
    assert n_parameters < _MAX_PARAMETERS, f"{config.model_type} lacks a small setting: {n_parameters} parameters"
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * _NOISE)
    return model


@functools.cache
def documents():
    """Token ids of documents for two sequences of equal length: long before short, at and beyond windows, one token."""
    import numpy as np

    rng = np.random.default_rng(7)
    return tuple(rng.integers(3, N_TOKENS, length) for length in (40, 3, 5, WINDOW, WINDOW + 1, 1, 30))
