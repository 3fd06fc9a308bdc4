"""Loads a model's files onto a device, without its language-model head.

Only local files, only safetensors, no code from the model's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from extractor_service.errors import (
    DeviceOom,
    FieldInvalid,
    LoadFailed,
    ModelUnsupported,
    NotImplementedYet,
)
from extractor_service.runner.hookpoints import check_identity

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all

# Large enough for a disk's sequential speed, small enough for smooth progress.
_PIECE_BYTES = 8 * 1024 * 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Both isolate packed documents by their position ids alone. FlashAttention does so only for a batch of one sequence.
_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, in evaluation mode."""

    model: PreTrainedModel
    device: torch.device
    files_path: Path
    measured_bytes: int


def load_model(
    files_path: Path,
    device: str,
    dtype: str,
    load_options: Mapping[str, Any],
    on_progress: OnProgress,
) -> LoadedModel:
    """Loads the model in `files_path`, telling `on_progress` how many bytes of weights were read.

    Raises FieldInvalid, NotImplementedYet, ModelUnsupported, LoadFailed and DeviceOom.
    """
    target, compute_dtype = _device(device), _compute_dtype(device, dtype)
    attention = _attention(load_options)
    config = _config(files_path)
    weights = _weight_files(files_path)
    estimated_bytes = sum(_estimate(path, compute_dtype.itemsize) for path in weights)
    _check_room(target, estimated_bytes)
    total_bytes = sum(path.stat().st_size for path in weights)
    on_progress(0, total_bytes)
    warm_page_cache(weights, total_bytes, on_progress)
    with out_of_memory_as_typed(target, estimated_bytes), _load_errors(files_path, config):
        model = _from_pretrained(files_path, target, compute_dtype, attention)
        check_identity(model)
    on_progress(total_bytes, total_bytes)
    return LoadedModel(model=model, device=target, files_path=files_path, measured_bytes=measured_bytes(model))


def warm_page_cache(paths: list[Path], total_bytes: int, on_progress: OnProgress) -> None:
    """Reads the files from front to back, as far as they fit in half of the memory that is free.

    Loading maps them, and a cold mapping is read page by page in the order of the tensors: slower than a plain read.
    """
    budget = psutil.virtual_memory().available // 2
    done = 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while done < budget and (n_bytes := file.readinto(buffer)):
                done += n_bytes
                on_progress(done, total_bytes)


def measured_bytes(model: PreTrainedModel) -> int:
    """Bytes the model takes on its device: the allocator's on an accelerator, those of the tensors on a CPU."""
    device = model.device
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@contextmanager
def out_of_memory_as_typed(device: torch.device, estimated_bytes: int, advice: str = "") -> Iterator[None]:
    """Turns running out of memory, which torch reports in three ways, into DeviceOom."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and not isinstance(exc, torch.OutOfMemoryError) and not _is_cpu_oom(exc):
            raise
        raise _device_oom(device, estimated_bytes, advice) from exc


def _is_cpu_oom(exc: RuntimeError) -> bool:
    return "DefaultCPUAllocator" in str(exc) or "MPS backend out of memory" in str(exc)


def _device_oom(device: torch.device, estimated_bytes: int, advice: str = "") -> DeviceOom:
    if device.type == "cuda":
        free_bytes, used_bytes = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    else:
        free_bytes, used_bytes = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    return DeviceOom(
        f"{device} has {free_bytes} bytes free, which is not enough: {estimated_bytes} were estimated. "
        f"{advice or 'Unload a model there, or load this one on another device or in a smaller dtype.'}",
        metadata={
            "device": str(device),
            "estimated_bytes": str(estimated_bytes),
            "measured_bytes": str(used_bytes),
            "free_bytes": str(free_bytes),
        },
    )


def _check_room(device: torch.device, estimated_bytes: int) -> None:
    """Refuses before the system would kill this process for memory that it can't have."""
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if estimated_bytes > free_bytes:
        raise _device_oom(device, estimated_bytes)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise FieldInvalid(f"{name!r} is no device; use cpu, cuda:<number> or mps.", field="device") from exc
    there = {
        "cpu": lambda: True,
        "cuda": lambda: torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
    }.get(device.type, lambda: False)
    if not there():
        raise FieldInvalid(f"Device {name!r} is not there for this process; use cpu.", field="device")
    return device


def _compute_dtype(device: str, dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise FieldInvalid(f"Compute dtype {dtype!r} is unknown; use {', '.join(_DTYPES)}.", field="dtype")
    if device == "cpu" and dtype == "float16":
        raise FieldInvalid(
            "float16 is several times slower than float32 on a CPU; use float32 or bfloat16.", field="dtype"
        )
    return _DTYPES[dtype]


def _attention(load_options: Mapping[str, Any]) -> str:
    unknown = sorted(set(load_options) - {"attn_implementation"})
    if unknown:
        raise FieldInvalid(
            f"Load option {unknown[0]!r} is unknown; attn_implementation is the only one.", field="load_options"
        )
    attention = load_options.get("attn_implementation", _ATTENTION[0])
    if attention not in _ATTENTION:
        raise FieldInvalid(
            f"attn_implementation {attention!r} does not isolate packed documents here; use {' or '.join(_ATTENTION)}.",
            field="load_options.attn_implementation",
        )
    return str(attention)


def _config(files_path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((files_path / "config.json").read_bytes())
    except (OSError, ValueError) as exc:
        raise ModelUnsupported(f"{files_path} has no readable config.json; prepare the model again.") from exc
    if not isinstance(config, dict):
        raise ModelUnsupported(f"{files_path / 'config.json'} is no JSON object; prepare the model again.")
    if config.get("quantization_config"):
        raise NotImplementedYet(
            "Loading weights that are stored quantized is not in this version; use the full weights."
        )
    return config


def _weight_files(files_path: Path) -> list[Path]:
    """The files that from_pretrained will read: those of the index, or the single one."""
    try:
        index = files_path / "model.safetensors.index.json"
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ModelUnsupported(f"{index} can't be read; prepare the model again.") from exc
    paths = [files_path / name for name in sorted(names)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelUnsupported(
            f"{files_path} has no {missing[0]}; only safetensors are loaded. Prepare the model again."
        )
    return paths


def _estimate(path: Path, itemsize: int) -> int:
    """Bytes of a file's tensors in the compute dtype, from its header."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(entry["shape"]) * itemsize for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as exc:
        raise LoadFailed(f"{path} is no safetensors file, or is damaged; prepare the model again.") from exc


def _from_pretrained(files_path: Path, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    # Progress is told by events, and weights that are missing by an error.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    model, report = AutoModel.from_pretrained(
        files_path,
        dtype=dtype,
        attn_implementation=attention,
        device_map=None if device.type == "cpu" else {"": device},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    # transformers would go on with random numbers in their place.
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        raise LoadFailed(
            f"The files lack {len(absent)} weights of this model, {absent[0]} among them; prepare it again."
        )
    return model.eval().requires_grad_(requires_grad=False)


@contextmanager
def _load_errors(files_path: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Names what went wrong in libraries that raise whatever comes to hand."""
    try:
        yield
    except SafetensorError as exc:
        raise LoadFailed(f"A weight file in {files_path} is damaged ({exc}); prepare the model again.") from exc
    except (OSError, ValueError, KeyError, ImportError) as exc:
        known = config.get("model_type")
        raise ModelUnsupported(
            f"transformers can't build a model of type {known!r} from {files_path}: {str(exc)[:500]}",
            metadata={"model_type": str(known)},
        ) from exc
    except RuntimeError as exc:
        if isinstance(exc, torch.OutOfMemoryError) or _is_cpu_oom(exc):
            raise
        raise LoadFailed(f"The model in {files_path} can't be loaded: {str(exc)[:500]}") from exc
