"""Loads a model's files onto a device, without its language-model head.

Reads local files only, and weights from safetensors only; runs no code from the model's folder unless the load options
say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import DeviceOom, FieldInvalid, LoadFailed, ModelUnsupported, NotImplementedYet
from headrace_extractor.models import check_files
from headrace_extractor.runner.hooks.binding import check_identity
from headrace_extractor.runner.models.accounting import check_weights, conversions_named
from headrace_extractor.runner.models.load_options import (
    attention_of,
    check_options,
    config_of,
    max_bytes_of,
    supports_sdpa,
    without_pooler,
)
from headrace_extractor.runner.models.progress import OnProgress
from headrace_extractor.runner.models.quantizers import quantizer_for
from headrace_extractor.runner.out_of_memory import is_out_of_memory
from headrace_models import folder
from headrace_models.errors import HeaderInvalid, JsonInvalid, WeightsAbsent
from headrace_models.folder import FileStamp
from headrace_models.json_files import read_object
from headrace_models.load_options import trusts_remote_code
from headrace_models.safetensors import TensorEntry, read_header

# Large enough for a disk's sequential speed, small enough for smooth progress.
_PIECE_BYTES = 8 * 1024 * 1024
# Preparing again looks at dates alone; a file that a disk has damaged keeps its own.
MEND = "mend it, then prepare the model again with --verify"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, in evaluation mode."""

    model: PreTrainedModel
    device: torch.device
    files_path: Path
    measured_bytes: int
    files: tuple[FileStamp, ...]  # As they were when it was loaded.
    runtime_bytes: int = 0  # The part of `measured_bytes` that the process took before the load.

    def check_files(self) -> None:
        """Raises ModelChanged if a file changed since: tokens would not be the model's, nor weights that are mapped."""
        check_files(self.files_path, self.files)

    @property
    def n_positions(self) -> int | None:
        """Number of positions of the text model; None where the config sets no limit."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for module in self.model.modules():
            # RoBERTa's positions begin behind the row of padding, so that its table has more rows than a text tokens.
            is_table = isinstance(module, torch.nn.Embedding) and module.num_embeddings == limit
            if limit and is_table and module.padding_idx is not None:
                return limit - module.padding_idx - 1
        return limit


def load_model(
    files_path: Path,
    device: str,
    dtype: str,
    load_options: Mapping[str, Any],
    on_progress: OnProgress,
    *,
    quantization: str = "none",
    files: Sequence[FileStamp] = (),
) -> LoadedModel:
    """Loads the model in `files_path`, telling `on_progress` how many bytes of weights were read.

    With a quantization, `files_path` holds the weights that its quantizer saved. `files` are the files as they were
    when the model was prepared. Raises FieldInvalid, NotImplementedYet, ModelUnsupported, ModelChanged, LoadFailed,
    DeviceOom and ExtraMissing.
    """
    target, compute_dtype = device_of(device), compute_dtype_of(device, dtype)
    options = check_options(load_options, target)
    stored = stored_config(files_path)
    _check_stored(stored, quantization, files_path)
    weights = weight_files(files_path)
    # As this node sees them: another mount of the same disk may give other inodes.
    digests = {stamp.name: stamp.sha256 for stamp in files}
    read = sorted({*weights, *folder.files_beside(files_path)})
    stamps = tuple(FileStamp.of(path, sha256=digests.get(path.name, "")) for path in read)
    check_files(files_path, files)
    estimated_bytes = sum(
        # Floats are loaded in the compute dtype, integers (quantized weights) as they are.
        tensor.n_elements * compute_dtype.itemsize if "F" in tensor.dtype else tensor.n_bytes
        for path in weights
        for tensor in tensors_in(path).values()
    )
    # Checked before anything is loaded: past the free memory, the system would kill this process instead.
    max_bytes = max_bytes_of(options, target)
    if max_bytes is not None and estimated_bytes > max_bytes:
        raise _device_oom(target, estimated_bytes, f"max_memory allows {max_bytes}; raise it, or use a smaller dtype.")
    free_bytes = torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else psutil.virtual_memory().available
    if estimated_bytes > free_bytes:
        raise _device_oom(target, estimated_bytes)
    total_bytes = sum(path.stat().st_size for path in weights)
    runtime_bytes = own_bytes(target)
    on_progress(0, total_bytes)
    warm_page_cache(weights, total_bytes, on_progress)
    with out_of_memory_as_typed(target, estimated_bytes), load_errors(files_path, stored):
        arguments = from_pretrained_arguments(files_path, target, compute_dtype, options)
        model = from_pretrained(files_path, arguments, quantization).requires_grad_(requires_grad=False)
        check_identity(model)
    check_files(files_path, stamps)  # Nothing was written while they were read.
    on_progress(total_bytes, total_bytes)
    return LoadedModel(
        model=model,
        device=target,
        files_path=files_path,
        files=stamps,
        measured_bytes=measured_bytes(model, runtime_bytes),
        runtime_bytes=runtime_bytes,
    )


def _check_stored(config: Mapping[str, Any], quantization: str, files_path: Path) -> None:
    if quantization == "none" and config.get("quantization_config"):
        raise NotImplementedYet(
            "Loading weights that somebody else quantized is not in this version; register the full weights, with a "
            "quantization."
        )
    if quantization != "none" and not config.get("quantization_config"):
        raise ModelUnsupported(f"{files_path} holds no quantized weights; prepare the model again.")


def from_pretrained_arguments(
    files_path: Path, device: torch.device, dtype: torch.dtype | str, load_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of from_pretrained. Raises FieldInvalid for an option that the model does not have.

    The dtype may be `auto`, that of the files.
    """
    config: PretrainedConfig = config_of(files_path, load_options)
    attention: str | None = attention_of(load_options, supports_sdpa=supports_sdpa(config))
    if config.sub_configs and "attn_implementation" not in load_options:
        attention = None  # The parts of a multimodal model may differ in what they have; transformers asks each.
    return {
        "config": config,
        "dtype": dtype,
        "attn_implementation": attention,
        "device_map": None if device.type == "cpu" else {"": device},
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": trusts_remote_code(load_options),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # They are in the loading info then, by name.
        **without_pooler(config),
    }


def from_pretrained(files_path: Path, arguments: dict[str, Any], quantization: str) -> PreTrainedModel:
    """Builds a model in evaluation mode from its files, every weight of which has its place. Raises LoadFailed."""
    hush_transformers()
    with conversions_named():
        if quantization == "none":
            model, report = AutoModel.from_pretrained(files_path, **arguments)
        else:
            model, report = quantizer_for(quantization).load(files_path, arguments)
    check_weights(model, report)
    return model.eval()


def warm_page_cache(paths: list[Path], total_bytes: int, on_progress: OnProgress) -> None:
    """Reads the files from front to back, as far as they fit into half of the free memory.

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


def own_bytes(device: torch.device) -> int:
    """Returns the main memory that the end of this process would free; 0 unless the device is a CPU."""
    return int(psutil.Process().memory_full_info().uss) if device.type == "cpu" else 0


def measured_bytes(model: PreTrainedModel, runtime_bytes: int) -> int:
    """Returns the bytes that the model takes: the allocator's on an accelerator, the process's own on a CPU.

    Weights in their stored dtype stay mapped, and a mapped page is the process's own only once a pass has read it. So
    the figure is at least that of the empty process, `runtime_bytes`, and the tensors.
    """
    device = model.device
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return max(own_bytes(device), runtime_bytes + tensor_bytes(model))


def tensor_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of parameters, buffers and the scales of quantized weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        # bitsandbytes keeps scales as attributes of the weight, which torch does not list.
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        scales = (getattr(parameter, "SCB", None), getattr(state, "absmax", None), getattr(nested, "absmax", None))
        tensors += [scale for scale in scales if isinstance(scale, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def out_of_memory_as_typed(device: torch.device, estimated_bytes: int, advice: str = "") -> Iterator[None]:
    """Raises DeviceOom when the device runs out of memory, which torch reports by three exceptions."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
        raise _device_oom(device, estimated_bytes, advice) from exc


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


def device_of(name: str) -> torch.device:
    """Returns the device of that name. Raises FieldInvalid if this process can't use it."""
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise FieldInvalid(f"{name!r} is no device; use cpu, cuda:<number> or mps.", field="device") from exc
    match device.type:
        case "cpu":
            is_usable = True
        case "cuda":
            is_usable = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        case "mps":
            is_usable = torch.backends.mps.is_available()
        case _:
            is_usable = False
    if not is_usable:
        raise FieldInvalid(f"Device {name!r} is not there for this process; use cpu.", field="device")
    return device


def compute_dtype_of(device: str, dtype: str) -> torch.dtype:
    """Returns the dtype of the forward pass. Raises FieldInvalid."""
    if dtype not in _DTYPES:
        raise FieldInvalid(f"Compute dtype {dtype!r} is unknown; use {', '.join(_DTYPES)}.", field="dtype")
    if device == "cpu" and dtype == "float16":
        raise FieldInvalid(
            "float16 is several times slower than float32 on a CPU; use float32 or bfloat16.", field="dtype"
        )
    return _DTYPES[dtype]


def stored_config(files_path: Path) -> Mapping[str, Any]:
    """Reads config.json as it is. Raises ModelUnsupported."""
    try:
        return read_object(files_path / "config.json")
    except OSError as exc:
        raise ModelUnsupported(f"{files_path} has no readable config.json; prepare the model again.") from exc
    except JsonInvalid as exc:
        raise ModelUnsupported(f"{files_path / 'config.json'} {exc.problem}; prepare the model again.") from exc


def weight_files(files_path: Path) -> list[Path]:
    """Lists the files that from_pretrained will read. Raises ModelUnsupported."""
    try:
        return folder.weight_files(files_path)
    except WeightsAbsent as exc:
        raise ModelUnsupported(
            f"{files_path} lacks {exc.problem}; only safetensors are loaded. Complete the folder, then prepare the "
            "model again."
        ) from exc
    except (OSError, JsonInvalid) as exc:
        raise ModelUnsupported(f"{files_path} can't be read ({exc}); prepare the model again.") from exc


def tensors_in(path: Path) -> Mapping[str, TensorEntry]:
    """Returns the entries of a safetensors file's header by tensor. Raises LoadFailed."""
    try:
        return read_header(path).tensors
    except HeaderInvalid as exc:
        raise LoadFailed(f"{path} is no safetensors file, or is damaged; {MEND}.") from exc


def hush_transformers() -> None:
    """Turns off transformers' progress bars and warnings: events tell progress, and missing weights are an error."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@contextmanager
def load_errors(files_path: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Turns the exceptions of libraries, which are of many types, into LoadFailed or ModelUnsupported."""
    try:
        yield
    except SafetensorError as exc:
        raise LoadFailed(f"A weight file in {files_path} is damaged ({exc}); {MEND}.") from exc
    except (ServiceError, MemoryError):
        raise
    except RuntimeError as exc:
        if is_out_of_memory(exc):
            raise
        raise LoadFailed(f"The model in {files_path} can't be loaded: {str(exc)[:500]}") from exc
    except Exception as exc:  # The code of any architecture: a config that it does not expect fails in any way.
        known = config.get("model_type")
        raise ModelUnsupported(
            f"transformers can't build a model of type {known!r} from {files_path}: {str(exc)[:500]}",
            metadata={"model_type": str(known)},
        ) from exc
