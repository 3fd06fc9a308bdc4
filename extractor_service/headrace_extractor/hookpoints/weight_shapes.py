"""Shapes of a model's weights, from the headers of its safetensors files, and the width of a module that follows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from headrace_models.config import Network
from headrace_models.errors import ModelFilesError
from headrace_models.safetensors import read_header

Shape = tuple[int, ...]

# Names of the base model inside transformers' models with a head.
HEADED = frozenset({"model", "transformer", "gpt_neox", "bert", "base_model"})

# The linear layers of these families keep their weight as [in, out].
_TRANSPOSED = frozenset({"gpt2", "gpt_bigcode", "openai-gpt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShapes:
    """Shape by tensor name, as the files spell it."""

    shapes: Mapping[str, Shape]

    @classmethod
    def of_folder(cls, files_path: str) -> WeightShapes:
        """Reads the headers of all weight files; a file that can't be read adds no shape."""
        paths = sorted(Path(files_path).glob("*.safetensors")) if files_path else []
        return _read(tuple((str(path), path.stat().st_mtime_ns) for path in paths))

    def below(self, path: str) -> dict[str, Shape]:
        """Returns the tensors of a module of the base model and of its submodules, by their name below the module."""
        found = {}
        for name, shape in self.shapes.items():
            head, dotted, rest = name.partition(f"{path}.")
            # The path must begin a name, behind at most the names of the base model: `model.layers.1.` and `layers.1.`.
            *outer, last = head.split(".")
            if dotted and not last and HEADED.issuperset(outer):
                found[rest] = shape
        return found


def module_shape(path: str, side: str, network: Network, weights: WeightShapes) -> Shape | str:
    """Returns the shape of a row that enters (`side` is `in`) or leaves a module, or why it can't be told."""
    below = weights.below(path)
    if not below:
        return "there is no such module with weights, and only those have a width that the files tell"
    weight = below.get("weight")
    if weight is None:  # A module made of modules: attention, MLP, experts.
        return (network.d_model,)
    if len(weight) == 1:
        size = weight[0]
        if size != network.d_head or size == network.d_model:
            return (size,)
        # As wide as a head: a norm inside attention, applied to each head of the queries or of the keys.
        of_queries = path.rsplit(".", 1)[-1].startswith("q")
        return (network.n_heads if of_queries else network.n_kv_heads, size)
    return _matrix_shape(path, side, weight, network)


def _matrix_shape(path: str, side: str, weight: Shape, network: Network) -> Shape | str:
    if len(weight) != 2:
        return "its weight is no matrix"
    if "embed" in path or path in ("wte", "wpe"):
        return (weight[1],) if side == "out" else "token ids go into it"
    if weight[1] == 1:
        return "its files are quantized, so they do not tell its width"
    outputs, inputs = reversed(weight) if network.model_type in _TRANSPOSED else weight
    return (outputs if side == "out" else inputs,)


# The times of last change are there for the cache: files of a model that is prepared again are read again.
@lru_cache(maxsize=16)
def _read(files: tuple[tuple[str, int], ...]) -> WeightShapes:
    shapes: dict[str, Shape] = {}
    for path, _mtime_ns in files:
        with contextlib.suppress(OSError, ModelFilesError):
            shapes |= {name: tensor.shape for name, tensor in read_header(Path(path)).tensors.items()}
    return WeightShapes(shapes=shapes)
