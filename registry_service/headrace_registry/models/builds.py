"""What files a node makes from others: quantized once from unquantized ones, safetensors from pickled ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from headrace_registry.models.files import Inspection
from headrace_registry.models.models import Failure, Fidelity, Model, Quantization

_UNPICKLED = "-unpickled"


def is_quantized(model: Model) -> bool:
    """True if its weights are to be made from others."""
    return model.quantization is not Quantization.NONE


def quantized_folder(root: Path, model: Model, commit_sha: str) -> Path:
    """Where the weights of one model, commit and quantization lie."""
    digest = commit_sha.removeprefix("sha256:")[:12]
    return root / f"{model.id}-{digest}-{model.quantization.lower()}"


def unpickled_folder(pickled: Path) -> Path:
    """Where the safetensors of a repo lie that has only pickled weights."""
    return pickled.with_name(pickled.name + _UNPICKLED)


def quantizes(target_path: str, source_path: str) -> bool:
    """True if a build quantizes what is in its source; else it converts."""
    return bool(source_path) and not target_path.endswith(_UNPICKLED)


def merged(base: Inspection, quantized: Inspection) -> Inspection:
    """Architecture, parameters and tokenizer of the source, bytes of the quantized files.

    Packed tensors have neither the shape nor the number of the parameters they stand for.
    """
    weights = replace(base.weights, weight_bytes=quantized.weights.weight_bytes)
    return replace(base, weights=weights)


class ClaimLost(Exception):
    """The preparation was cancelled, finished or taken over."""


class FilesDoomed(Exception):
    """The files are about to be removed: they are to be made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildState:
    """A build as its worker sees it. `node_id` is empty while no node has it."""

    node_id: str
    target_path: str
    done: bool
    failure: Failure | None
    node_alive: bool
    silent_s: float
    fidelity: Fidelity | None = None
