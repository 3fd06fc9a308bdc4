"""Converts pickled weights to safetensors. Only tensors are unpickled; a file with anything else is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headrace_extractor.errors import LoadFailed, ModelUnsupported
from headrace_extractor.runner.models.new_folder import new_folder
from headrace_extractor.runner.models.progress import OnProgress
from headrace_models.errors import JsonInvalid
from headrace_models.folder import has_older_tokenizer
from headrace_models.json_files import read_config

_PATTERN = "pytorch_model*.bin"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"


def convert_pickled(source_path: Path, target_path: Path, on_progress: OnProgress) -> None:
    """Writes the model with safetensors to `target_path`, complete or not at all; an existing folder stays.

    Shards stay shards, so no more than one is in memory. Raises ModelUnsupported, LoadFailed and DiskFull.
    """
    if target_path.exists():
        return
    shards = sorted(source_path.glob(_PATTERN))
    if not shards:
        raise ModelUnsupported(f"There are no pickled weights in {source_path}; prepare the model again.")
    total_bytes = sum(shard.stat().st_size for shard in shards)
    done_bytes = 0
    with new_folder(target_path) as folder:
        folder.mkdir()
        for path in source_path.iterdir():
            if path.is_file() and not path.is_symlink() and not path.name.startswith((".", "pytorch_model")):
                shutil.copyfile(path, folder / path.name)
        config = folder / "config.json"
        if not config.is_file():
            raise ModelUnsupported("The repo has no config.json; use one in transformers' layout.")
        try:
            # Where the config is silent, transformers assumes that the head is the embedding.
            ties_head = bool(read_config(folder).get("tie_word_embeddings", True))
        except JsonInvalid as exc:
            raise ModelUnsupported(f"{exc}; mend the config.") from exc
        weight_map: dict[str, str] = {}
        for shard in shards:
            on_progress(done_bytes, total_bytes)
            name = shard.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            tensors = _own_memory(_tensors_of(shard), ties_head=ties_head)
            save_file(tensors, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            done_bytes += shard.stat().st_size
        if len(shards) > 1:
            (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
        if has_older_tokenizer({path.name for path in folder.iterdir()}):
            from headrace_extractor.runner.models.tokenizer_files import try_to_add  # noqa: PLC0415 -- transformers

            try_to_add(source_path, folder)
    on_progress(total_bytes, total_bytes)


def _tensors_of(shard: Path) -> dict[str, torch.Tensor]:
    """Reads a shard with torch's restricted unpickler."""
    try:
        try:
            loaded = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as exc:  # A file from before torch 1.6, or a file system that maps no files.
            if "mmap" not in str(exc):
                raise
            loaded = torch.load(shard, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise ModelUnsupported(
            f"{shard.name} holds more than tensors and is not read, since that could run code; convert the model with "
            "save_pretrained() where you trust it, and register the folder."
        ) from exc
    except (RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise LoadFailed(f"{shard.name} can't be read: {str(exc)[:300]}") from exc
    if not isinstance(loaded, dict) or not all(isinstance(each, torch.Tensor) for each in loaded.values()):
        raise ModelUnsupported(f"{shard.name} is no table of tensors; use a repo whose weights are.")
    return {str(name): tensor for name, tensor in loaded.items()}


def _own_memory(tensors: dict[str, torch.Tensor], *, ties_head: bool) -> dict[str, torch.Tensor]:
    """Gives each tensor memory of its own, as safetensors demands; leaves out a tied head, which a load restores."""
    seen: set[tuple[Any, ...]] = set()
    own = {}
    # The head last, so that it is the head that is left out and not the embedding.
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0].endswith(_HEAD), item[0])):
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if place in seen and ties_head and name.endswith(_HEAD):
            continue
        own[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return own
