"""Names, dtypes and shapes of a model's tensors, from the headers of its safetensors files. Nothing else is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_models.errors import HeaderInvalid, JsonInvalid
from headrace_models.json_files import read_object
from headrace_models.safetensors import TensorEntry, read_header
from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.models.files import architecture_from
from headrace_registry.sizing.estimate import Profile
from headrace_registry.sizing.tensors import Tensor, tally_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """`config.json` and every tensor of a model."""

    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    def profile(self) -> Profile:
        """Returns the figures that the estimator needs."""
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
    """Reads a folder's config and headers. Raises ModelUnsupported, DigestMismatch, errors of `check_path`. Blocks."""
    paths = _weight_files(folder)
    try:
        if check_path is not None:
            for path in (folder / "config.json", *paths):
                check_path(path)
        config = read_object(folder / "config.json")
        tensors = [tensor for path in paths for tensor in tensors_from(read_header(path).tensors)]
    except OSError as exc:
        raise ModelUnsupported(f"{folder.name} lacks {Path(exc.filename or '').name}; prepare the model again") from exc
    except ValueError as exc:  # No file can have a name with NUL or half a surrogate pair.
        raise ModelUnsupported(f"{_INDEX} of {folder.name} names no files; prepare the model again") from exc
    except JsonInvalid as exc:
        raise ModelUnsupported(f"config.json of {folder.name} {exc.problem}; prepare the model again") from exc
    except HeaderInvalid as exc:
        raise DigestMismatch(f"{exc}; fetch it again") from exc
    return Headers(config=config, tensors=tuple(tensors))


def tensors_from(entries: Mapping[str, TensorEntry]) -> Iterable[Tensor]:
    """Yields the tensors of a header, as the estimator counts them."""
    for name, entry in entries.items():
        yield Tensor(name=name, dtype=entry.dtype, shape=entry.shape)


def _weight_files(folder: Path) -> list[Path]:
    """Lists the files that a runner reads: the index's, else the single file, else every file of the folder."""
    if (folder / _INDEX).is_file():
        try:
            names = set(read_object(folder / _INDEX)["weight_map"].values())
            # Names alone: an index may not lead out of its folder.
            return [folder / Path(str(name)).name for name in sorted(names)]
        except (JsonInvalid, KeyError, TypeError, AttributeError) as exc:
            raise ModelUnsupported(f"{_INDEX} of {folder.name} can't be read; prepare the model again") from exc
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelUnsupported(f"{folder.name} has no safetensors weights; convert it with save_pretrained() first")
    return found
