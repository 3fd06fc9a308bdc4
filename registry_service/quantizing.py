"""What a quantized model's files are: made once by a node from unquantized ones, which models of one source share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from registry_service.files import Inspection
from registry_service.models import Model, Quantization


def is_quantized(model: Model) -> bool:
    """True if its weights are to be made from others."""
    return model.quantization is not Quantization.NONE


def quantized_folder(root: Path, model: Model, commit_sha: str) -> Path:
    """Where the weights of one model, commit and quantization lie."""
    digest = commit_sha.removeprefix("sha256:")[:12]
    return root / f"{model.id}-{digest}-{model.quantization.lower()}"


def merged(base: Inspection, quantized: Inspection) -> Inspection:
    """Architecture, parameters and tokenizer of the source, bytes of the quantized files.

    Packed tensors have neither the shape nor the number of the parameters they stand for.
    """
    weights = replace(base.weights, weight_bytes=quantized.weights.weight_bytes)
    return replace(base, weights=weights)
