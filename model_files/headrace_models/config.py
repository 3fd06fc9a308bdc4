"""The shape of a network, read from its `config.json`, whatever names the family uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace_models.errors import ConfigInvalid

# The same number under the names that families give it; the first name that holds a number wins.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "d_model": ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
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
# Several times the largest network that anybody has published. Memory and time of a server grow with these numbers, and
# a config is a file from outside. A context window of more than 31 bits means none.
BOUNDS: Mapping[str, int] = {
    "n_layers": 1_000,
    "d_model": 2**20,
    "n_heads": 2**16,
    "n_kv_heads": 2**16,
    "d_head": 2**16,
    "d_mlp": 2**24,
    "vocab_size": 2**24,
}
_MAX_NAME = 255
# Published files leave out settings that have the default of their family's config class; these are the defaults.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "falcon": {"multi_query": True, "parallel_attn": True},
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
}
_TIED_BY_DEFAULT = frozenset({"gpt2", "opt", "gemma", "gemma2", "gemma3_text", "bloom", "gpt_bigcode", "gpt_neo"})
# Hybrids of several kinds of layers may name the kind of each instead of their number.
_KINDS_OF_LAYERS = ("layers_block_type", "layer_types", "block_types")
# In these families the MLP is four times as wide as the residual stream, unless the config says otherwise.
_FOUR_TIMES = frozenset({"gpt2", "gptj", "gpt_neo", "gpt_bigcode", "bloom", "falcon", "codegen"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The numbers of a config, 0 or empty where the config does not tell; `fields` has its settings as they are."""

    model_type: str
    class_name: str = ""
    n_layers: int
    d_model: int
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    vocab_size: int = 0
    context_window: int = 0
    tied_embeddings: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Network:
        """Reads a config; a multimodal config keeps the text model's settings under `text_config`.

        Raises ConfigInvalid for a number beyond its bound.
        """
        model_type = _name(config.get("model_type"))
        text = config.get("text_config")
        fields = {**_DEFAULTS.get(model_type, {}), **config, **(text if isinstance(text, Mapping) else {})}
        numbers = {name: _first(fields, spellings) for name, spellings in _NAMES.items()}
        kinds = next((value for name in _KINDS_OF_LAYERS if isinstance(value := fields.get(name), list)), ())
        numbers["n_layers"] = numbers["n_layers"] or len(kinds)
        for name, bound in BOUNDS.items():
            if numbers[name] > bound:
                raise ConfigInvalid(f"{' or '.join(_NAMES[name][:2])} is larger than {bound}, the most Headrace reads")
        if numbers["context_window"] >= 2**31:
            numbers["context_window"] = 0
        if fields.get("multi_query") is True and not fields.get("new_decoder_architecture"):
            numbers["n_kv_heads"] = 1
        numbers["n_kv_heads"] = numbers["n_kv_heads"] or numbers["n_heads"]
        if not numbers["d_head"] and numbers["n_heads"]:
            numbers["d_head"] = numbers["d_model"] // numbers["n_heads"]
        if not numbers["d_mlp"] and model_type in _FOUR_TIMES:
            numbers["d_mlp"] = 4 * numbers["d_model"]
        classes = config.get("architectures")
        return cls(
            model_type=model_type,
            class_name=_name(classes[0]) if isinstance(classes, list) and classes else "",
            tied_embeddings=bool(fields.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
            fields=fields,
            **numbers,
        )

    @property
    def masks_both_ways(self) -> bool:
        """True where transformers gives a decoder the masks of an encoder."""
        return not self.fields.get("is_causal", True)

    @property
    def looks_ahead(self) -> bool:
        """True where the config lets a decoder's tokens attend to later tokens."""
        return self.masks_both_ways or bool(self.fields.get("use_bidirectional_attention"))

    @property
    def picks_tokens(self) -> bool:
        """True for sparse attention: each token attends to the best few of all tokens of its sequence."""
        return any(self.fields.get(name) for name in ("index_topk", "index_topk_blocks", "indexer_budget"))

    @property
    def has_window(self) -> bool:
        """True where some layers attend only to tokens within a window."""
        kinds = self.fields.get("layer_types")
        if kinds and isinstance(kinds, list | tuple):
            return any(kind != "full_attention" for kind in kinds)
        is_used = self.fields.get("use_sliding_window", True)
        return bool(is_used and _first(self.fields, ("sliding_window", "window_size")))

    @property
    def rotation_limits(self) -> tuple[int, ...]:
        """Positions beyond which LongRoPE rotates all tokens of a pass by other angles, one for each kind of layer."""
        rope = self.fields.get("rope_parameters")
        kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
        long = [kind for kind in kinds if isinstance(kind, Mapping) and kind.get("rope_type") == "longrope"]
        return tuple(_first(kind, ("original_max_position_embeddings",)) for kind in long)


def _name(value: Any) -> str:
    # Half of a surrogate pair, and NUL, are no text that a database or a message can hold.
    return value[:_MAX_NAME] if isinstance(value, str) and value.isprintable() else ""


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Returns the first of the names that holds a positive whole number; 0 without one."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
