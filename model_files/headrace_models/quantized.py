"""Checkpoints that somebody quantized: whether they can be loaded, as their config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# transformers loads the others by packages of their own, or on GPUs alone; a set has to be the same on every node.
_KNOWN = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "gptq": "GPTQ",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "modelopt": "ModelOpt",
}


def quantized_by(config: Mapping[str, Any]) -> str:
    """Returns the method by which a checkpoint's weights are quantized, as people call it; empty for full weights."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, Mapping) else {})
    # An early name of the entry, which some published configs still have.
    entries = [place.get(name) for place in places for name in ("quantization_config", "compression_config")]
    for entry in entries:
        if isinstance(entry, Mapping) and entry:
            method = str(entry.get("quant_method") or "")
            if not method and (entry.get("load_in_8bit") or entry.get("load_in_4bit")):
                method = "bitsandbytes"
            return _KNOWN.get(method, method[:40] or "an unknown method")
    return ""


def problem_of(config: Mapping[str, Any]) -> str:
    """Says why a checkpoint can't be loaded because it is quantized, and what to do; empty for full weights."""
    method = quantized_by(config)
    if not method:
        return ""
    return (
        f"its weights are quantized by {method}, and this version loads full weights only; register the model's full "
        "weights, with quantization int8 or int4 to save memory"
    )
