"""Inspects a folder in transformers' layout without loading it.

Parameter counts and bytes are exact: they come from the safetensors headers (8 bytes little-endian length, then JSON).
Everything here blocks; callers run it in a thread and stop it through `Reading.stop`.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.models.architecture import architecture_from
from headrace_registry.models.models import Architecture

# The longest header safetensors itself accepts.
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_FILES = 10_000
_READ_BYTES = 4 * 1024 * 1024
# What makes up a model; caches, notes and weights in other formats beside it do not change its identity.
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")


class Stopped(Exception):
    """The reader was told to stop."""


@dataclass(slots=True)
class Reading:
    """Progress shared between a reading thread and the loop that watches it."""

    total_bytes: int = 0
    done_bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def add(self, n_bytes: int) -> None:
        """Counts bytes; raises Stopped once `stop` is set."""
        self.done_bytes += n_bytes
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What safetensors headers say, summed."""

    n_parameters: int
    weight_bytes: int
    parameters_by_dtype: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a folder holds; `digest` covers every model file."""

    architecture: Architecture
    weights: Weights
    tokenizer_digest: str
    digest: str


def inspect_folder(folder: Path, *, reading: Reading, check_path: Callable[[Path], None] | None = None) -> Inspection:
    """Reads the whole folder once. Raises ModelUnsupported, DigestMismatch or Stopped."""
    paths = model_files(folder)
    if check_path is not None:
        for path in paths:
            check_path(path)
    reading.total_bytes = sum(path.stat().st_size for path in paths)
    architecture = architecture_from(_json_object(folder / "config.json"))
    weights = read_weights(path for path in paths if path.suffix == ".safetensors")
    check_index(folder)
    digests = {path.relative_to(folder).as_posix(): file_digest(path, reading=reading) for path in paths}
    return Inspection(
        architecture=architecture,
        weights=weights,
        tokenizer_digest=digests.get("tokenizer.json", ""),
        digest=folder_digest(digests),
    )


def model_files(folder: Path) -> list[Path]:
    """Lists the model's files at the top of the folder, in order."""
    if not folder.is_dir():
        raise ModelUnsupported(f"{folder} is no folder any more; restore it or register another path")
    paths = sorted(
        p for p in folder.iterdir() if p.suffix in MODEL_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if len(paths) > _MAX_FILES:
        raise ModelUnsupported(f"{folder} holds more than {_MAX_FILES} files; give the folder of one model")
    return paths


def folder_digest(digests: dict[str, str]) -> str:
    """SHA-256 over names and digests, `sha256:` in front: the commit of local files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path, *, reading: Reading) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            reading.add(len(block))
    return digest.hexdigest()


def read_weights(paths: Iterable[Path]) -> Weights:
    """Sums the headers of all safetensors files; a tensor name that occurs twice is refused."""
    by_dtype: dict[str, int] = {}
    seen: set[str] = set()
    weight_bytes = 0
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in seen:
                raise ModelUnsupported(f"tensor {name!r} is in two files of the folder; keep one copy of the weights")
            seen.add(name)
            dtype, n_parameters, n_bytes = tensor
            by_dtype[dtype] = by_dtype.get(dtype, 0) + n_parameters
            weight_bytes += n_bytes
    if not seen:
        raise ModelUnsupported("no *.safetensors weights in the folder; convert the model with save_pretrained() first")
    return Weights(n_parameters=sum(by_dtype.values()), weight_bytes=weight_bytes, parameters_by_dtype=by_dtype)


def read_header(path: Path) -> dict[str, tuple[str, int, int]]:
    """Returns {tensor: (dtype, parameters, bytes)} and checks that the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise DigestMismatch(
                f"{path.name} is cut or no safetensors file; fetch it again", metadata={"file": path.name}
            )
        try:
            header = json.loads(file.read(length))
            tensors = {name: _tensor(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            message = f"{path.name} has a header that is no safetensors header; fetch it again"
            raise DigestMismatch(message, metadata={"file": path.name}) from exc
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise DigestMismatch(
            f"{path.name} has {size} bytes, its header says {8 + length + end}; fetch it again",
            metadata={"file": path.name},
        )
    return tensors


def _tensor(entry: dict[str, Any]) -> tuple[str, int, int]:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or not all(isinstance(n, int) and n >= 0 for n in [*shape, start, end]):
        raise ValueError(entry)
    return entry["dtype"], math.prod(shape), end - start


def check_index(folder: Path) -> None:
    """Refuses a sharded folder that lacks a shard its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    shards = _json_object(index).get("weight_map")
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    missing = sorted(name for name in names if not (folder / Path(name).name).is_file())
    if missing:
        raise ModelUnsupported(f"the folder lacks {', '.join(missing[:5])}; fetch the missing shards")


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelUnsupported(f"the folder has no {path.name}; give a folder in transformers' layout")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelUnsupported(f"{path.name} is larger than {_MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as exc:
        raise ModelUnsupported(f"{path.name} is no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelUnsupported(f"{path.name} is no JSON object")
    return value
