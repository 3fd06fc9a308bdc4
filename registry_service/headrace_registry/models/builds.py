"""Builds: model files that a node makes from other files, by converting or by quantizing them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from headrace_registry.models.files import Inspection
from headrace_registry.models.models import Failure, Fidelity, Model, ModelState, Quantization, SourceKind

_TOKENIZER = "-tokenizer"


class BuildKind(StrEnum):
    """The kinds of builds, by the files that a build starts from."""

    CONVERT_GGUF = "CONVERT_GGUF"  # From the model's GGUF file.
    CONVERT_PICKLED = "CONVERT_PICKLED"  # From a folder of pickled weights.
    CONVERT_TOKENIZER = "CONVERT_TOKENIZER"  # From a folder with its tokenizer in an older form.
    QUANTIZE = "QUANTIZE"  # From a folder of unquantized weights.

    @property
    def state(self) -> ModelState:
        """State of a model while a node carries out the build."""
        return ModelState.QUANTIZING if self is BuildKind.QUANTIZE else ModelState.CONVERTING


def build_kind(model: Model, target_path: str) -> BuildKind:
    """Kind of the build of a folder for a model, by the model's state, its source and the folder's name."""
    if model.state is ModelState.QUANTIZING:
        return BuildKind.QUANTIZE
    if target_path.endswith(_TOKENIZER):
        return BuildKind.CONVERT_TOKENIZER
    return BuildKind.CONVERT_GGUF if model.source.kind is SourceKind.GGUF else BuildKind.CONVERT_PICKLED


def is_quantized(model: Model) -> bool:
    """True if a node quantizes the model's files, after any conversion."""
    return model.quantization is not Quantization.NONE


def quantized_folder(root: Path, model: Model, commit_sha: str) -> Path:
    """Folder for the quantized weights of one model and commit."""
    digest = commit_sha.removeprefix("sha256:")[:12]
    return root / f"{model.id}-{digest}-{model.quantization.lower()}"


def tokenizer_folder(root: Path, model: Model, commit_sha: str) -> Path:
    """Folder for the tokenizer.json that a node makes for one model and commit."""
    return root / f"{model.id}-{commit_sha.removeprefix('sha256:')[:12]}{_TOKENIZER}"


def unpickled_folder(pickled: Path) -> Path:
    """Folder for the safetensors made from a folder of pickled weights."""
    return pickled.with_name(f"{pickled.name}-unpickled")


def merged(base: Inspection, quantized: Inspection) -> Inspection:
    """Returns the inspection of the unquantized files with the stamps and the weight bytes of the quantized ones.

    The quantized files can't tell the parameters: packed tensors have neither their shape nor their number.
    """
    weights = replace(base.weights, weight_bytes=quantized.weights.weight_bytes)
    return replace(base, weights=weights, files=quantized.files)


class ClaimLost(Exception):
    """The preparation was cancelled, finished or taken over."""


class BuildFailed(Exception):
    """A node could not make the files."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class FilesDoomed(Exception):
    """The model's files are about to be removed, so the preparation has to make them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildState:
    """A build as the preparation's worker sees it. `node_id` is empty while no node has the build."""

    node_id: str
    target_path: str
    done: bool
    failure: Failure | None
    node_alive: bool
    silent_s: float
    fidelity: Fidelity | None = None
