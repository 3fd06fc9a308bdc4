"""Load options, as a runner applies them: each takes effect, or is refused with the reason.

`dtype` comes with the command. `low_cpu_mem_usage` is how weights are loaded anyway, `use_fast` how text is tokenized.
A residency is on one device, so `device_map` may only name that device, and `max_memory` only limit it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig

from headrace_extractor.errors import FieldInvalid
from headrace_models.errors import LoadOptionInvalid
from headrace_models.load_options import DEVICE_MAPS, OPTIONS, checked_options, size_bytes, trusts_remote_code

# Both isolate packed documents by their position ids alone. FlashAttention does so only for a batch of one sequence.
_ATTENTION = ("sdpa", "eager")
# Entries of `rope_parameters` that do not scale: the base of the rotation, and which dimensions are rotated. They are
# kept when another scaling is asked for, since some families have them nowhere else.
_UNSCALED = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def check_options(options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns the options with whole numbers as ints. Raises FieldInvalid for an option that can't take effect."""
    try:
        checked = checked_options(options)
    except LoadOptionInvalid as exc:
        field = f"load_options.{exc.option}" if exc.option in OPTIONS else "load_options"
        raise FieldInvalid(f"{exc}.", field=field) from exc
    attention_of(checked, supports_sdpa=True)
    if checked.get("use_fast") is False:
        raise _refused(
            "use_fast", "token ids come from tokenizer.json, which only the fast tokenizers read; leave it out"
        )
    if checked.get("low_cpu_mem_usage") is False:
        raise _refused("low_cpu_mem_usage", "weights are never held twice while loading; leave it out")
    device_map = checked.get("device_map", "auto")
    if device_map not in DEVICE_MAPS:
        named = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        # `cuda` alone is its first device.
        if not {str(name) for name in named} <= _names_of(device) | {device.type if device.index in (None, 0) else ""}:
            raise _refused(
                "device_map", f"the model is loaded on {device} alone; choose another device for the load instead"
            )
    max_bytes_of(checked, device)
    return checked


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Returns the argument that leaves out an encoder's pooler: files of a language model have no weights for it."""
    kind = MODEL_MAPPING.get(type(config), None)
    has_pooler = isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def supports_sdpa(config: PretrainedConfig) -> bool:
    """True if transformers runs this architecture with SDPA; some architectures have only attention of their own."""
    try:
        kind = MODEL_MAPPING[type(config)]
    except KeyError:  # Code from the model's folder.
        return True
    return bool(getattr(kind, "_supports_sdpa", False))


def attention_of(options: Mapping[str, Any], *, supports_sdpa: bool) -> str:
    """Returns the attention implementation: SDPA unless another is asked for or needed. Raises FieldInvalid."""
    attention = options.get("attn_implementation", "sdpa" if supports_sdpa else "eager")
    if attention == "sdpa" and not supports_sdpa:
        raise _refused(
            "attn_implementation",
            "transformers has no sdpa for this architecture; leave it out, and eager is used",
        )
    if attention not in _ATTENTION:
        raise _refused(
            "attn_implementation",
            f"{attention!r} does not isolate packed documents here; use {' or '.join(_ATTENTION)}",
        )
    return str(attention)


def max_bytes_of(options: Mapping[str, Any], device: torch.device) -> int | None:
    """Returns what `max_memory` allows on the device, in bytes; None without a limit. Raises FieldInvalid."""
    limits = options.get("max_memory", {})
    own = _names_of(device)
    if not limits.keys() <= own:
        raise _refused("max_memory", f"the model is loaded on {device} alone; limit that, as {min(own)!r}")
    return min(map(size_bytes, limits.values()), default=None)


def config_of(files_path: Path, options: Mapping[str, Any]) -> PretrainedConfig:
    """Reads the model's config and applies the options. Raises FieldInvalid where the config lacks such a setting."""
    trusted = trusts_remote_code(options)
    config = AutoConfig.from_pretrained(files_path, local_files_only=True, trust_remote_code=trusted)
    if "rope_scaling" in options:
        _scale_rope(config, options["rope_scaling"])
    if "sliding_window" in options:
        _set_window(config, options["sliding_window"])
    return config


def _scale_rope(config: PretrainedConfig, scaling: Any) -> None:
    known = getattr(config, "rope_parameters", None)
    if not isinstance(known, dict) or "rope_theta" not in known:
        raise _refused("rope_scaling", f"a model of type {config.model_type!r} has no rotary embedding to scale")
    given = dict(scaling or {"rope_type": "default"})
    kind = given.pop("type", None)
    kept = {name: known[name] for name in _UNSCALED if name in known}
    config.rope_parameters = {**kept, "rope_type": kind, **given}
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as exc:
        raise _refused("rope_scaling", f"transformers refuses it: {str(exc)[:300]}") from exc


def _set_window(config: PretrainedConfig, window: Any) -> None:
    if not hasattr(config, "sliding_window"):
        raise _refused("sliding_window", f"a model of type {config.model_type!r} has no sliding window")
    config.sliding_window = window
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = window is not None
    types = getattr(config, "layer_types", None)
    if window is None and types:
        config.layer_types = ["full_attention"] * len(types)
    elif types and "sliding_attention" not in types:
        raise _refused("sliding_window", "none of the model's layers has a window; leave it out")


def _names_of(device: torch.device) -> set[str]:
    """Returns the spellings of a device: `cpu`, or `cuda:1` and also `1`."""
    return {"cpu"} if device.type == "cpu" else {str(device), str(device.index or 0)}


def _refused(option: str, why: str) -> FieldInvalid:
    return FieldInvalid(f"{option}: {why}.", field=f"load_options.{option}")
