"""Tries whether a model works here: loads it, runs it, and compares it with plain transformers."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import LoadFailed, ModelUnsupported, NonFinite, reason_of
from headrace_extractor.node.runner_protocol import Step, Validate, Validated
from headrace_extractor.runner.hooks.binding import anatomy_of, n_layers_of
from headrace_extractor.runner.models.load_options import config_of, without_pooler
from headrace_extractor.runner.models.loading import (
    LoadedModel,
    compute_dtype_of,
    device_of,
    from_pretrained_arguments,
    hush_transformers,
    load_errors,
    load_model,
    out_of_memory_as_typed,
    stored_config,
    tensors_in,
    weight_files,
)
from headrace_extractor.runner.models.probe import difference, residuals, sample_ids, worst
from headrace_extractor.runner.models.quantizers import quantizer_for
from headrace_models.load_options import trusts_remote_code

_N_TOKENS = 128
_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "tokenizers")
# Both run the same kernels on the same shapes; only masks and their order of sums may differ. A third of a percent is
# what bfloat16 rounds by.
_MAX_RELATIVE_ERROR = {torch.float32: 1e-4}
_MAX_RELATIVE_ERROR_16 = 1e-2

Emit = Callable[[Step], None]
Figures = Mapping[str, float]


class StepFound(Exception):
    """A step came to an end, and what it found is not as it should be."""

    def __init__(self, error: ServiceError, figures: Figures) -> None:
        super().__init__(error.message)
        self.error = error
        self.figures = figures


@dataclass(slots=True, kw_only=True)
class _Trial:
    """What the steps hand on to one another."""

    command: Validate
    token_ids: list[int] = field(default_factory=list)
    loaded: LoadedModel | None = None
    acts: list[Tensor] = field(default_factory=list)


def validate(command: Validate, emit: Emit) -> Validated:
    """Runs the steps in order, telling when each begins and how it ends; after one that failed the rest is skipped."""
    hush_transformers()
    trial = _Trial(command=command)
    failed = False
    for name, carry_out in _STEPS.items():
        if failed:
            emit(Step(name=name, state="SKIPPED", message="an earlier step failed"))
            continue
        emit(Step(name=name, state="RUNNING"))
        started = time.monotonic()
        try:
            message, figures = carry_out(trial)
            step = Step(name=name, state="PASSED", message=message, figures=figures)
        except StepFound as found:
            step = _failed(name, found.error, found.figures)
        except ServiceError as exc:
            step = _failed(name, exc, {})
        failed = step.state == "FAILED"
        emit(_timed(step, time.monotonic() - started))
    return Validated(versions=_versions())


def _dry_load(trial: _Trial) -> tuple[str, Figures]:
    """Builds the network without memory and matches the files' tensors with it, by name and shape."""
    command = trial.command
    files_path = Path(command.files_path)
    stored = stored_config(files_path)
    with load_errors(files_path, stored):
        if command.quantization == "none":
            n_parameters = _dry_load_by_transformers(command, files_path)
        else:
            n_parameters = _dry_load_by_names(command, files_path)
    return f"{n_parameters} parameters, all in the files", {"n_parameters": float(n_parameters)}


def _dry_load_by_transformers(command: Validate, files_path: Path) -> int:
    config = config_of(files_path, command.load_options)
    model, report = AutoModel.from_pretrained(
        files_path,
        config=config,
        device_map={"": "meta"},
        dtype="auto",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trusts_remote_code(command.load_options),
        output_loading_info=True,
        **without_pooler(config),
    )
    _check_complete({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    return sum(parameter.numel() for parameter in model.parameters())


def _dry_load_by_names(command: Validate, files_path: Path) -> int:
    """For quantized files, whose packed tensors have shapes of their own: names, and the shapes of the others."""
    config = config_of(files_path, command.load_options)
    del config.quantization_config
    with torch.device("meta"):
        trusted = trusts_remote_code(command.load_options)
        model = AutoModel.from_config(config, trust_remote_code=trusted, **without_pooler(config))
    stored = {name: entry for path in weight_files(files_path) for name, entry in tensors_in(path).items()}
    parameters = dict(model.named_parameters())
    wrong = {
        name
        for name, parameter in parameters.items()
        if name not in stored or ("F" in stored[name].dtype and tuple(parameter.shape) != stored[name].shape)
    }
    _check_complete(wrong)
    return sum(parameter.numel() for parameter in parameters.values())


def _check_complete(absent: set[str]) -> None:
    if absent:
        raise LoadFailed(
            f"Config and files differ in {len(absent)} weights, {min(absent)} among them; prepare the model again."
        )


def _load(trial: _Trial) -> tuple[str, Figures]:
    command = trial.command
    started = time.monotonic()
    trial.loaded = load_model(
        Path(command.files_path),
        command.device,
        command.dtype,
        command.load_options,
        lambda *_: None,
        quantization=command.quantization,
    )
    measured = trial.loaded.measured_bytes
    figures = {"measured_bytes": float(measured), "load_s": time.monotonic() - started}
    return f"{measured} bytes on {command.device}", figures


def _forward(trial: _Trial) -> tuple[str, Figures]:
    loaded = _held(trial)
    limit = loaded.n_positions
    trial.token_ids = sample_ids(loaded.files_path, limit=_N_TOKENS, longest=limit)
    started = time.monotonic()
    with out_of_memory_as_typed(loaded.device, loaded.measured_bytes):
        trial.acts = residuals(loaded.model, trial.token_ids)
    n_tokens = len(trial.token_ids)
    return f"{n_tokens} tokens through {len(trial.acts)} layers", {
        "n_tokens": float(n_tokens),
        "n_layers": float(len(trial.acts)),
        "tokens_per_s": n_tokens / max(time.monotonic() - started, 1e-9),
    }


def _finite(trial: _Trial) -> tuple[str, Figures]:
    shape = (len(trial.token_ids), anatomy_of(_held(trial).model).catalogue.network.d_model)
    wrong = [layer for layer, acts in enumerate(trial.acts) if tuple(acts.shape) != shape]
    bad = [layer for layer, acts in enumerate(trial.acts) if not bool(acts.isfinite().all())]
    n_bad = sum(int((~acts.isfinite()).sum()) for acts in trial.acts)
    figures = {"n_non_finite": float(n_bad), "max_abs": max(_max_abs(acts) for acts in trial.acts)}
    if wrong:
        message = f"Behind layer {wrong[0]} come {tuple(trial.acts[wrong[0]].shape)} values, not {shape}."
        raise StepFound(ModelUnsupported(f"{message} Use another model."), figures)
    if bad:
        raise StepFound(
            NonFinite(
                f"{n_bad} values are not finite, the first behind layer {bad[0]}; use dtype bfloat16 or float32.",
                metadata={"hookpoint": f"blocks.{bad[0]}.hook_resid_post"},
            ),
            figures,
        )
    return f"{len(trial.acts)} matrices of {shape[0]} x {shape[1]}", figures


def _parity(trial: _Trial) -> tuple[str, Figures]:
    """Loads the model anew, the plain way, and compares what it calls hidden states.

    The last of them is behind the final norm, so the last block is left out; ours is given up first, since there is
    room for one.
    """
    command = trial.command
    files_path = Path(command.files_path)
    device, dtype = device_of(command.device), compute_dtype_of(command.device, command.dtype)
    n_layers = n_layers_of(_held(trial).model)
    trial.loaded = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    arguments = from_pretrained_arguments(files_path, device, dtype, command.load_options)
    with out_of_memory_as_typed(device, 0), load_errors(files_path, stored_config(files_path)):
        if command.quantization == "none":
            plain, _ = AutoModel.from_pretrained(files_path, **arguments)
        else:
            plain, _ = quantizer_for(command.quantization).load(files_path, arguments)
        plain.eval()
        with torch.inference_mode():
            ids = torch.tensor([trial.token_ids], device=device)
            states = plain(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    compared = [difference(trial.acts[layer], states[layer + 1][0].cpu()) for layer in range(n_layers - 1)]
    if not compared:
        return "a single layer, which transformers shows behind its norm only", {}
    figures = worst(compared)
    limit = _MAX_RELATIVE_ERROR.get(dtype, _MAX_RELATIVE_ERROR_16)
    if not figures["max_relative_error"] <= limit:
        error = figures["max_relative_error"]
        raise StepFound(
            ModelUnsupported(f"The residual stream differs from plain transformers by {error:.2g}; report a bug."),
            figures,
        )
    return f"layers 0 to {n_layers - 2} as in plain transformers", figures


_STEPS: dict[str, Callable[[_Trial], tuple[str, Figures]]] = {
    "dry_load": _dry_load,
    "load": _load,
    "forward": _forward,
    "finite": _finite,
    "parity": _parity,
}


def _held(trial: _Trial) -> LoadedModel:
    assert trial.loaded is not None
    return trial.loaded


def _max_abs(acts: Tensor) -> float:
    return float(acts.nan_to_num(posinf=0.0, neginf=0.0).abs().max())


def _failed(name: str, error: ServiceError, figures: Figures) -> Step:
    return Step(name=name, state="FAILED", message=error.message, figures=figures, reason=reason_of(error))


def _timed(step: Step, seconds: float) -> Step:
    finite = {key: value for key, value in step.figures.items() if math.isfinite(value)}  # JSON has no other numbers.
    return replace(step, seconds=seconds, figures=finite)


def _versions() -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, "headrace"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
