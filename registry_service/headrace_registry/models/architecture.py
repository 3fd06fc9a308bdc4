"""Reads the network's shape from `config.json`, whatever names the family uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace_registry.models.models import Architecture

# The same number under the names that families give it; the first present wins.
_NAMES: dict[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "d_model": ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "d_head": ("head_dim", "d_kv"),
    "d_mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "context_window": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "seq_length",
        "max_sequence_length",
    ),
}
_FOUR_TIMES = {"gpt2", "gptj", "gpt_bigcode", "bloom", "falcon", "codegen", "gpt_neo"}
_TIED_BY_DEFAULT = {"gpt2", "opt", "gemma", "gemma2", "gemma3_text", "bloom", "gpt_bigcode", "gpt_neo"}


def architecture_from(config: Mapping[str, Any]) -> Architecture:
    """Collects what the file says; multimodal configs keep the text model under `text_config`."""
    text = config.get("text_config")
    fields = {**config, **text} if isinstance(text, dict) else dict(config)
    model_type = str(config.get("model_type") or "")
    numbers = {field: _first(fields, names) for field, names in _NAMES.items()}
    numbers["n_kv_heads"] = _n_kv_heads(fields, numbers)
    if not numbers["d_head"] and numbers["n_heads"]:
        numbers["d_head"] = numbers["d_model"] // numbers["n_heads"]
    if not numbers["d_mlp"] and model_type in _FOUR_TIMES:
        numbers["d_mlp"] = 4 * numbers["d_model"]
    classes = config.get("architectures")
    return Architecture(
        model_type=model_type,
        class_name=str(classes[0]) if isinstance(classes, list) and classes else "",
        tied_embeddings=bool(fields.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        **numbers,
    )


def _n_kv_heads(fields: Mapping[str, Any], numbers: Mapping[str, int]) -> int:
    if fields.get("multi_query") is True and not fields.get("new_decoder_architecture"):
        return 1
    return numbers["n_kv_heads"] or numbers["n_heads"]


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
    return 0
