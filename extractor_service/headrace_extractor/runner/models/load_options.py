"""Load options, as a runner applies them: each takes effect, or is refused with the reason.

`dtype` comes with the command. `low_cpu_mem_usage` is how weights are loaded anyway, `use_fast` how text is tokenized.
A residency is on one device, so `device_map` may only say what is the case, and `max_memory` only limit that device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig

from headrace_extractor.errors import FieldInvalid

# Both isolate packed documents by their position ids alone. FlashAttention does so only for a batch of one sequence.
_ATTENTION = ("sdpa", "eager")
_KNOWN = (
    "dtype",
    "device_map",
    "max_memory",
    "attn_implementation",
    "rope_scaling",
    "low_cpu_mem_usage",
    "use_fast",
    "sliding_window",
    "trust_remote_code",
)
# Spread over the allowed devices, of which there is one.
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# What `rope_parameters` say besides scaling, some families only there: the base, and which dimensions are rotated.
_UNSCALED = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def check_options(options: Mapping[str, Any], device: torch.device) -> None:
    """Refuses what can't take effect, before anything is read. Raises FieldInvalid."""
    unknown = sorted(set(options) - set(_KNOWN))
    if unknown:
        raise FieldInvalid(f"Load option {unknown[0]!r} is unknown; use {', '.join(_KNOWN)}.", field="load_options")
    attention_of(options, supports_sdpa=True)
    if options.get("use_fast") is False:
        raise _refused(
            "use_fast", "token ids come from tokenizer.json, which only the fast tokenizers read; leave it out"
        )
    if options.get("low_cpu_mem_usage") is False:
        raise _refused("low_cpu_mem_usage", "weights are never held twice while loading; leave it out")
    _check_device_map(options.get("device_map"), device)
    max_bytes_of(options, device)


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """BERT's pooler is behind its blocks, and files of a masked language model lack it."""
    return {"add_pooling_layer": False} if config.model_type == "bert" else {}


def supports_sdpa(config: PretrainedConfig) -> bool:
    """True if transformers runs this architecture with SDPA; some need what only their own code computes."""
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
    limits = options.get("max_memory")
    if limits is None:
        return None
    own = _names_of(device)
    if not isinstance(limits, Mapping) or not {str(name) for name in limits} <= own:
        raise _refused("max_memory", f"the model is loaded on {device} alone; limit that, as {min(own)!r}")
    return min((_bytes(size) for size in limits.values()), default=None)


def config_of(files_path: Path, options: Mapping[str, Any]) -> PretrainedConfig:
    """Reads the model's config and changes what the options change of it. Raises FieldInvalid where it has no such."""
    config = AutoConfig.from_pretrained(files_path, local_files_only=True, trust_remote_code=trusts_code(options))
    if "rope_scaling" in options:
        _scale_rope(config, options["rope_scaling"])
    if "sliding_window" in options:
        _set_window(config, options["sliding_window"])
    return config


def trusts_code(options: Mapping[str, Any]) -> bool:
    """True if code from the model's folder may run; the registry asks its operator before it says so."""
    return options.get("trust_remote_code") is True


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


def _check_device_map(device_map: Any, device: torch.device) -> None:
    if device_map is None or device_map in _STRATEGIES:
        return
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    if not {str(place) for place in places} <= _names_of(device) | {device.type if device.index in (None, 0) else ""}:
        raise _refused(
            "device_map", f"the model is loaded on {device} alone; choose another device for the load instead"
        )


def _names_of(device: torch.device) -> set[str]:
    """How a device is written: `cpu`, or `cuda:1` and also `1`."""
    return {"cpu"} if device.type == "cpu" else {str(device), str(device.index or 0)}


def _bytes(size: Any) -> int:
    if isinstance(size, int | float):
        return int(size)
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise _refused("max_memory", f"{size!r} is no size; write bytes, or such as '10GiB'")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " KMGT".index(unit.upper() or " "))


def _refused(option: str, why: str) -> FieldInvalid:
    return FieldInvalid(f"{option}: {why}.", field=f"load_options.{option}")
