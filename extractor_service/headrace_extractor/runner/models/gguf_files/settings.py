"""Settings in a GGUF file that change what its model computes, against the config that transformers made of them.

transformers reads the settings that its table has for an architecture, and takes the defaults of the config class for
all others without a word: other bases and scales of rotations, no window, another epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import PretrainedConfig

# Settings of files, below the name of the architecture, and the names that configs have for them.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "expert_weights_scale": ("routed_scaling_factor",),
}
# Values by which a file says that there is no such setting.
_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "expert_weights_scale": (0.0, 1.0),
}
# Files do not tell how the largest Gemma 2 scales its attention; programs know it by its number of blocks.
_GEMMA2_27B_LAYERS = 46


def settings_left_out(config: PretrainedConfig, path: Path) -> list[str]:
    """Returns the settings of a file that the config made of it does not have, as `name = value`."""
    fields = GGUFReader(path).fields
    prefix = f"{fields['general.architecture'].contents()}."
    settings = {
        name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)
    }
    left_out: list[tuple[str, Any]] = []
    for name, spellings in _NAMES.items():
        value = settings.get(name)
        is_set = isinstance(value, int | float) and value not in _NEUTRAL.get(name, ())
        if is_set and not any(_equal(getattr(config, spelling, None), value) for spelling in spellings):
            left_out.append((name, value))
    window = settings.get("attention.sliding_window")
    # A window as long as the context leaves out nothing.
    matters = window and not (isinstance(window, int) and window >= settings.get("context_length", math.inf))
    if matters and not _equal(getattr(config, "sliding_window", None), window):
        left_out.append(("attention.sliding_window", window))
    if settings.get("attention.causal") is False and getattr(config, "is_causal", True):
        left_out.append(("attention.causal", False))
    left_out += _rotations_left_out(config, settings)
    scalar = config.hidden_size // config.num_attention_heads if config.model_type == "gemma2" else 0
    if scalar and config.num_hidden_layers == _GEMMA2_27B_LAYERS and config.query_pre_attn_scalar != scalar:
        left_out.append(("query_pre_attn_scalar", scalar))
    return [f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}" for name, value in left_out]


def _rotations_left_out(config: PretrainedConfig, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [kind for kind in rope.values() if isinstance(kind, Mapping)]
    kinds = nested or [rope]  # Layers with and without a window may differ.
    base, n_rotated = settings.get("rope.freq_base"), settings.get("rope.dimension_count")
    if base is not None and not any(_equal(kind.get("rope_theta"), base) for kind in kinds):
        yield "rope.freq_base", base
    if rope and n_rotated is not None:
        widths = {getattr(config, name, None) or 0 for name in ("head_dim", "global_head_dim")} - {0}
        widths = widths or {config.hidden_size // config.num_attention_heads}
        known = {int(width * (kind.get("partial_rotary_factor") or 1.0)) for width in widths for kind in kinds}
        if n_rotated not in known | {getattr(config, "rotary_dim", None)}:
            yield "rope.dimension_count", n_rotated
    # As llama.cpp reads them: an absent kind is linear, and a factor of 0 or 1 is none.
    kind_of_scale = settings.get("rope.scaling.type", "linear")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 1.0))
    if kind_of_scale == "none" or factor in (0.0, 1.0):
        return
    if not any(kind.get("rope_type") == kind_of_scale and _equal(kind.get("factor"), factor) for kind in kinds):
        yield "rope.scaling.factor", factor


def _equal(known: Any, value: Any) -> bool:
    """True for equal numbers; files hold them in 32 bits."""
    numbers = isinstance(known, int | float) and isinstance(value, int | float)
    return numbers and math.isclose(known, value, rel_tol=1e-6)
