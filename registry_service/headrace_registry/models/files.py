"""Inspects a folder in transformers' layout without loading it.

Parameter counts and bytes are exact: they come from the headers of the safetensors files. Everything here blocks;
callers run it in a thread and stop it through `ReadProgress.stop`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_models.config import Network
from headrace_models.errors import HeaderInvalid, JsonInvalid
from headrace_models.json_files import read_object
from headrace_models.safetensors import read_header
from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.models.models import Architecture

# The largest models have some hundred files; a folder with more is a collection, registered by mistake.
_MAX_FILES = 10_000
# Large enough for a disk's sequential speed, small enough for smooth progress and a prompt stop.
_READ_BYTES = 4 * 1024 * 1024
# Files that make up a model. Caches, notes and weights in other formats beside them do not change its identity.
_MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")


class Stopped(Exception):
    """`ReadProgress.stop` was set."""


@dataclass(slots=True)
class ReadProgress:
    """How far a thread has read a folder, shared with the loop that watches it."""

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
    """Sums over the headers of all weight files."""

    n_parameters: int
    weight_bytes: int
    parameters_by_dtype: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The figures of a model's folder; `digest` covers every model file."""

    architecture: Architecture
    weights: Weights
    tokenizer_digest: str
    digest: str


def inspect_folder(
    folder: Path, *, reading: ReadProgress, check_path: Callable[[Path], None] | None = None
) -> Inspection:
    """Reads the whole folder once. Raises ModelUnsupported, DigestMismatch, Stopped, and errors of `check_path`."""
    if not folder.is_dir():
        raise ModelUnsupported(f"{folder} is no folder any more; restore it or register another path")
    paths = sorted(
        p for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if len(paths) > _MAX_FILES:
        raise ModelUnsupported(f"{folder} holds more than {_MAX_FILES} files; give the folder of one model")
    if check_path is not None:
        for path in paths:
            check_path(path)
    reading.total_bytes = sum(path.stat().st_size for path in paths)
    architecture = architecture_from(_json_object(folder / "config.json"))
    weights = read_weights(path for path in paths if path.suffix == ".safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _json_object(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
        missing = sorted(name for name in names if not (folder / Path(name).name).is_file())
        if missing:
            raise ModelUnsupported(f"the folder lacks {', '.join(missing[:5])}; fetch the missing shards")
    digests = {path.relative_to(folder).as_posix(): file_digest(path, reading=reading) for path in paths}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return Inspection(
        architecture=architecture,
        weights=weights,
        tokenizer_digest=digests.get("tokenizer.json", ""),
        digest="sha256:" + hashlib.sha256(lines.encode()).hexdigest(),  # The commit of local files.
    )


def architecture_from(config: Mapping[str, Any]) -> Architecture:
    """Returns the numbers of a `config.json` that the registry keeps."""
    network = Network.of_config(config)
    return Architecture(
        model_type=network.model_type,
        class_name=network.class_name,
        n_layers=network.n_layers,
        d_model=network.d_model,
        n_heads=network.n_heads,
        n_kv_heads=network.n_kv_heads,
        d_head=network.d_head,
        d_mlp=network.d_mlp,
        vocab_size=network.vocab_size,
        context_window=network.context_window,
        tied_embeddings=network.tied_embeddings,
    )


def file_digest(path: Path, *, reading: ReadProgress) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            reading.add(len(block))
    return digest.hexdigest()


def read_weights(paths: Iterable[Path]) -> Weights:
    """Sums the headers of safetensors files.

    Raises DigestMismatch for a damaged file, ModelUnsupported for no tensor at all or a name that occurs twice.
    """
    by_dtype: dict[str, int] = {}
    seen: set[str] = set()
    weight_bytes = 0
    for path in paths:
        try:
            header = read_header(path)
        except HeaderInvalid as exc:
            raise DigestMismatch(f"{exc}; fetch it again", metadata={"file": path.name}) from exc
        size = path.stat().st_size
        if header.file_bytes != size:
            raise DigestMismatch(
                f"{path.name} has {size} bytes, its header says {header.file_bytes}; fetch it again",
                metadata={"file": path.name},
            )
        for name, tensor in header.tensors.items():
            if name in seen:
                raise ModelUnsupported(f"tensor {name!r} is in two files of the folder; keep one copy of the weights")
            seen.add(name)
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.n_elements
            weight_bytes += tensor.n_bytes
    if not seen:
        raise ModelUnsupported("no *.safetensors weights in the folder; convert the model with save_pretrained() first")
    return Weights(n_parameters=sum(by_dtype.values()), weight_bytes=weight_bytes, parameters_by_dtype=by_dtype)


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelUnsupported(f"the folder has no {path.name}; give a folder in transformers' layout")
    try:
        return read_object(path)
    except JsonInvalid as exc:
        raise ModelUnsupported(str(exc)) from exc
