"""Names, dtypes and shapes of a model's tensors, from the headers of its safetensors files. Nothing else is read.

All of this runs under confinement; a server asks for `told_profile` and makes a Profile of its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace_models.errors import HeaderInvalid, JsonInvalid, TooManyTensors, WeightsAbsent
from headrace_models.folder import weight_files
from headrace_models.json_files import read_config
from headrace_models.safetensors import TensorEntry, read_header
from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.models.files import architecture_from, words_of
from headrace_registry.models.models import Architecture
from headrace_registry.models.roots import ModelRoots
from headrace_registry.sizing.estimate import Profile
from headrace_registry.sizing.tensors import Tally, Tensor, tally_of


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


def told_profile(folder: str, roots: list[str] | None) -> dict[str, Any]:
    """Returns the profile of a folder as JSON. With `roots`, its files must lie below these."""
    check = ModelRoots(map(Path, roots)).check_inside if roots is not None else None
    return profile_to_json(read_headers(Path(folder), check).profile())


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """Inverse of `profile_from_json`."""
    tally = profile.tally
    matrices = [[*sizes, n] for sizes, n in tally.matrices.items()]
    return {
        "network": asdict(profile.network),
        "tally": {"matrices": matrices, "n_kept": tally.n_kept, "fixed_bytes": tally.fixed_bytes},
        "stored_dtype": profile.stored_dtype,
    }


def profile_from_json(told: Mapping[str, Any]) -> Profile:
    """Returns the profile that a child read from headers."""
    matrices = {(elements, outputs): n for elements, outputs, n in told["tally"]["matrices"]}
    return Profile(
        network=Architecture(**told["network"]),
        tally=Tally(**{**told["tally"], "matrices": matrices}),
        exact=True,
        stored_dtype=told["stored_dtype"],
    )


def read_headers(folder: Path, check_path: Callable[[Path], None] | None = None) -> Headers:
    """Reads a folder's config and headers. Raises ModelUnsupported, DigestMismatch, errors of `check_path`. Blocks."""
    try:
        paths = weight_files(folder)
        if check_path is not None:
            for path in (folder / "config.json", *paths):
                check_path(path)
        config = read_config(folder)
        tensors = [tensor for path in paths for tensor in tensors_from(read_header(path).tensors)]
    except OSError as exc:
        raise ModelUnsupported(f"{folder.name} lacks {Path(exc.filename or '').name}; prepare the model again") from exc
    except (WeightsAbsent, JsonInvalid) as exc:
        raise ModelUnsupported(f"{folder.name} can't be loaded: {words_of(exc)}") from exc
    except HeaderInvalid as exc:
        raise DigestMismatch(f"{exc}; fetch it again") from exc
    except TooManyTensors as exc:
        raise ModelUnsupported(f"{exc}; merge or split its tensors") from exc
    return Headers(config=config, tensors=tuple(tensors))


def tensors_from(entries: Mapping[str, TensorEntry]) -> Iterable[Tensor]:
    """Yields the tensors of a header, as the estimator counts them."""
    for name, entry in entries.items():
        yield Tensor(name=name, dtype=entry.dtype, shape=entry.shape)
