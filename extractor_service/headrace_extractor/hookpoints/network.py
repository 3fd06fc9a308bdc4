"""The shape of a network, read from its `config.json` alone, whatever names the family uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_extractor.models import ModelInfo

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MODEL = ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_MLP = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
# Families whose MLP is four times as wide as the residual stream unless the config says otherwise.
_FOUR_TIMES = frozenset({"gpt2", "gptj", "gpt_neo", "gpt_bigcode", "bloom", "falcon", "codegen"})
# What published files of a family leave to the defaults of its config class.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "falcon": {"multi_query": True, "parallel_attn": True},
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Numbers that widths depend on, 0 where the config does not tell, and the config itself in `fields`."""

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Network:
        """Reads a config; a multimodal one keeps the text model under `text_config`."""
        text = config.get("text_config")
        model_type = str(config.get("model_type") or "")
        fields = {**_DEFAULTS.get(model_type, {}), **config, **(text if isinstance(text, Mapping) else {})}
        d_model, n_heads = _first(fields, _MODEL), _first(fields, _HEADS)
        d_mlp = _first(fields, _MLP) or (4 * d_model if model_type in _FOUR_TIMES else 0)
        return cls(
            model_type=model_type,
            n_layers=_first(fields, _LAYERS),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(fields, n_heads),
            d_head=_first(fields, ("head_dim",)) or (d_model // n_heads if n_heads else 0),
            d_mlp=d_mlp,
            fields=fields,
        )

    @property
    def masks_both_ways(self) -> bool:
        """True where transformers gives a decoder the masks of an encoder."""
        return not self.fields.get("is_causal", True)

    @property
    def looks_ahead(self) -> bool:
        """True where the config lets tokens of a decoder see those behind them."""
        return self.masks_both_ways or bool(self.fields.get("use_bidirectional_attention"))

    @property
    def has_window(self) -> bool:
        """True where some layers look only so far."""
        if kinds := self.fields.get("layer_types"):
            return any(kind != "full_attention" for kind in kinds)
        is_used = self.fields.get("use_sliding_window", True)
        return bool(is_used and _first(self.fields, ("sliding_window", "window_size")))

    @property
    def rotation_limits(self) -> tuple[int, ...]:
        """Positions beyond which LongRoPE rotates all tokens of a pass by other angles; for each kind of layer."""
        rope = self.fields.get("rope_parameters")
        kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
        long = [kind for kind in kinds if isinstance(kind, Mapping) and kind.get("rope_type") == "longrope"]
        return tuple(_first(kind, ("original_max_position_embeddings",)) for kind in long)


def network_of(model: ModelInfo) -> Network:
    """Reads the config beside a model's files; without one, what the registry knows."""
    try:
        config = json.loads((Path(model.files_path) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        return Network(model_type=model.model_type, n_layers=model.n_layers, d_model=model.d_model)
    return Network.of_config(config)


def _n_kv_heads(fields: Mapping[str, Any], n_heads: int) -> int:
    if fields.get("multi_query") is True and not fields.get("new_decoder_architecture"):
        return 1
    return _first(fields, _KV_HEADS) or n_heads


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
    return 0
