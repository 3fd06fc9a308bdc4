"""Names, dtypes and shapes of a model's tensors, from the headers of its safetensors files. Nothing else is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.models.architecture import architecture_from
from headrace_registry.sizing.estimate import Profile
from headrace_registry.sizing.tensors import Tensor, tally_of

_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 64 * 1024 * 1024
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """`config.json` and every tensor of a model."""

    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    def profile(self) -> Profile:
        """What the estimator needs of them."""
        network = architecture_from(self.config)
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.dtype in ("F32", "F16", "BF16"):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.n_elements
        return Profile(
            network=network,
            tally=tally_of(self.tensors, network.model_type),
            exact=True,
            stored_dtype=max(sizes, key=lambda dtype: sizes[dtype], default=""),
        )


def read_headers(folder: Path, check_path: Callable[[Path], None] | None = None) -> Headers:
    """Reads a folder's headers. Raises ModelUnsupported or DigestMismatch. Blocks."""
    paths = [folder / "config.json", *_weight_files(folder)]
    for path in paths if check_path is not None else ():
        assert check_path is not None
        check_path(path)
    try:
        config = json.loads(paths[0].read_bytes()[:_MAX_JSON_BYTES])
        tensors = [tensor for path in paths[1:] for tensor in _read_header(path)]
    except OSError as exc:
        raise ModelUnsupported(f"{folder.name} lacks {Path(exc.filename or '').name}; prepare the model again") from exc
    except ValueError as exc:
        raise ModelUnsupported(f"config.json of {folder.name} is no JSON; prepare the model again") from exc
    if not isinstance(config, dict):
        raise ModelUnsupported(f"config.json of {folder.name} is no JSON object; prepare the model again")
    return Headers(config=config, tensors=tuple(tensors))


def tensors_from(entries: Mapping[str, Any]) -> Iterable[Tensor]:
    """Reads a header's entries. Raises ValueError, TypeError or KeyError for anything else."""
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        shape = tuple(entry["shape"])
        if not isinstance(entry["dtype"], str) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(name)
        yield Tensor(name=name, dtype=entry["dtype"], shape=shape)


def _weight_files(folder: Path) -> list[Path]:
    """Those that a runner reads: the index's, or the single one, or all there are."""
    if (folder / _INDEX).is_file():
        try:
            names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
            return [folder / Path(str(name)).name for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ModelUnsupported(f"{_INDEX} of {folder.name} can't be read; prepare the model again") from exc
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelUnsupported(f"{folder.name} has no safetensors weights; convert it with save_pretrained() first")
    return found


def _read_header(path: Path) -> list[Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise DigestMismatch(f"{path.name} is cut or no safetensors file; fetch it again")
        raw = file.read(length)
    try:
        return list(tensors_from(json.loads(raw)))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise DigestMismatch(f"{path.name} has a header that is no safetensors header; fetch it again") from exc
