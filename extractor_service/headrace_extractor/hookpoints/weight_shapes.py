"""Shapes of a model's weights, from the headers of its safetensors files, and what they tell of a module's width."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from headrace_extractor.hookpoints.network import Network

Shape = tuple[int, ...]

# What transformers' models with a head call their base model.
HEADED = frozenset({"model", "transformer", "gpt_neox", "bert", "base_model"})

# A header lists every tensor; the largest models have some ten thousand of them.
_MAX_HEADER_BYTES = 64 * 1024 * 1024
# Families whose linear layers keep their weight as [in, out].
_TRANSPOSED = frozenset({"gpt2", "gpt_bigcode", "openai-gpt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShapes:
    """Shape by tensor name, as the files spell it."""

    shapes: Mapping[str, Shape]

    @classmethod
    def of_folder(cls, files_path: str) -> WeightShapes:
        """Reads all headers; those that can't be read tell nothing."""
        paths = sorted(Path(files_path).glob("*.safetensors")) if files_path else []
        return _read(tuple((str(path), path.stat().st_mtime_ns) for path in paths))

    def below(self, path: str) -> dict[str, Shape]:
        """Tensors of a module of the base model and of those inside it, by what follows the module's path."""
        dotted = f"{path}."
        found = {}
        for name, shape in self.shapes.items():
            head, there, rest = name.partition(dotted)
            if there and all(part in HEADED for part in head.split(".")[:-1]) and head.endswith(("", ".")[bool(head)]):
                found[rest] = shape
        return found


def module_shape(path: str, side: str, network: Network, weights: WeightShapes) -> Shape | str:
    """Returns the shape of a row of what enters or leaves a module, or why it can't be told."""
    below = weights.below(path)
    if not below:
        return "there is no such module with weights, and only those have a width that the files tell"
    weight = below.get("weight")
    if weight is None:  # Made of others: attention, MLP, experts.
        return (network.d_model,)
    if len(weight) == 1:
        return _norm_shape(path, weight[0], network)
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


def _norm_shape(path: str, size: int, network: Network) -> Shape:
    """A norm inside attention may be applied to each head."""
    if size != network.d_head or size == network.d_model:
        return (size,)
    last = path.rsplit(".", 1)[-1]
    return (network.n_heads if last.startswith("q") else network.n_kv_heads, size)


@lru_cache(maxsize=16)
def _read(files: tuple[tuple[str, int], ...]) -> WeightShapes:
    shapes: dict[str, Shape] = {}
    for path, _ in files:
        shapes |= _header(Path(path))
    return WeightShapes(shapes=shapes)


def _header(path: Path) -> dict[str, Shape]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size)) if size <= _MAX_HEADER_BYTES else {}
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
