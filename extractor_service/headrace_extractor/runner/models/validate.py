"""Tries whether a model works on this node: loads it, runs it, and compares it with plain transformers."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from headrace_chassis.errors import ServiceError
from headrace_extractor.errors import LoadFailed, ModelUnsupported, NonFinite, reason_of
from headrace_extractor.node.runner_protocol import Step, Validate, Validated
from headrace_extractor.node.versions import library_versions
from headrace_extractor.runner.hooks.binding import anatomy_of, n_layers_of
from headrace_extractor.runner.models.accounting import named
from headrace_extractor.runner.models.load_options import check_options, config_of, without_pooler
from headrace_extractor.runner.models.loading import (
    LoadedModel,
    compute_dtype_of,
    device_of,
    from_pretrained,
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
from headrace_models.load_options import trusts_remote_code

_N_TOKENS = 128
# Both sides run the same kernels on the same shapes; only masks and the order of sums may differ. In 16 bits that may
# come to a few roundings: bfloat16 rounds by a third of a percent.
_MAX_RELATIVE_ERROR = {torch.float32: 1e-4}
_MAX_RELATIVE_ERROR_16 = 1e-2

Emit = Callable[[Step], None]
Figures = Mapping[str, float]


class StepFound(Exception):
    """A step ran to its end and found that the model is not as it should be."""

    def __init__(self, error: ServiceError, figures: Figures) -> None:
        super().__init__(error.message)
        self.error = error
        self.figures = figures


def validate(command: Validate, emit: Emit) -> Validated:
    """Runs the steps in order and emits when each begins and how it ends; skips the steps behind a failed one."""
    hush_transformers()
    trial = _Trial(command=command)
    steps = {
        "dry_load": trial.dry_load,
        "load": trial.load,
        "forward": trial.forward,
        "finite": trial.finite,
        "parity": trial.parity,
    }
    failed = False
    for name, carry_out in steps.items():
        if failed:
            emit(Step(name=name, state="SKIPPED", message="an earlier step failed"))
            continue
        emit(Step(name=name, state="RUNNING"))
        started = time.monotonic()
        reason: str = ""
        figures: Figures = {}
        try:
            message, figures = carry_out()
        except StepFound as found:
            failed, message, reason, figures = True, found.error.message, reason_of(found.error), found.figures
        except ServiceError as exc:
            failed, message, reason = True, exc.message, reason_of(exc)
        emit(
            Step(
                name=name,
                state="FAILED" if failed else "PASSED",
                message=message,
                seconds=time.monotonic() - started,
                # JSON has no other numbers than finite ones.
                figures={key: value for key, value in figures.items() if math.isfinite(value)},
                reason=reason,
            )
        )
    return Validated(versions=library_versions())


@dataclass(slots=True, kw_only=True)
class _Trial:
    """One validation: the steps, and the values that they hand on to one another.

    A step returns a message and figures. It raises StepFound or another ServiceError if the model does not work.
    """

    command: Validate
    options: dict[str, Any] = field(default_factory=dict)  # The load options as a load takes them.
    token_ids: list[int] = field(default_factory=list)
    loaded: LoadedModel | None = None
    acts: list[Tensor] = field(default_factory=list)

    def dry_load(self) -> tuple[str, Figures]:
        """Builds the network without memory and matches the files' tensors with it, by name and shape."""
        command = self.command
        files_path = Path(command.files_path)
        self.options = check_options(command.load_options, device_of(command.device))
        with load_errors(files_path, stored_config(files_path)):
            config = config_of(files_path, self.options)
            trusted = trusts_remote_code(self.options)
            if command.quantization == "none":
                meta = torch.device("meta")
                arguments = from_pretrained_arguments(files_path, meta, "auto", self.options)
                model = from_pretrained(files_path, arguments, "none")
            else:
                # Packed tensors have shapes of their own: only shapes of unquantized ones can be compared.
                del config.quantization_config
                with torch.device("meta"):
                    model = AutoModel.from_config(config, trust_remote_code=trusted, **without_pooler(config))
                stored = {name: entry for path in weight_files(files_path) for name, entry in tensors_in(path).items()}
                absent = {
                    name
                    for name, parameter in model.named_parameters()
                    if name not in stored
                    or ("F" in stored[name].dtype and tuple(parameter.shape) != stored[name].shape)
                }
                if absent:
                    raise LoadFailed(f"Config and files differ in {named(absent)}; prepare the model again.")
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        return f"{n_parameters} parameters, all in the files", {"n_parameters": float(n_parameters)}

    def load(self) -> tuple[str, Figures]:
        """Loads the model as a `load` command does."""
        command = self.command
        started = time.monotonic()
        self.loaded = load_model(
            Path(command.files_path),
            command.device,
            command.dtype,
            command.load_options,
            lambda *_: None,
            quantization=command.quantization,
            files=command.files,
        )
        measured = self.loaded.measured_bytes
        figures = {"measured_bytes": float(measured), "load_s": time.monotonic() - started}
        return f"{measured} bytes on {command.device}", figures

    def forward(self) -> tuple[str, Figures]:
        """Runs a text through the model and keeps its residual stream."""
        assert self.loaded is not None
        self.token_ids = sample_ids(self.loaded.files_path, limit=_N_TOKENS, longest=self.loaded.n_positions)
        started = time.monotonic()
        with out_of_memory_as_typed(self.loaded.device, self.loaded.measured_bytes):
            self.acts = residuals(self.loaded.model, self.token_ids)
        n_tokens = len(self.token_ids)
        return f"{n_tokens} tokens through {len(self.acts)} layers", {
            "n_tokens": float(n_tokens),
            "n_layers": float(len(self.acts)),
            "tokens_per_s": n_tokens / max(time.monotonic() - started, 1e-9),
        }

    def finite(self) -> tuple[str, Figures]:
        """Looks for values that are NaN or infinite, and for layers of another shape than the config says."""
        assert self.loaded is not None
        shape = (len(self.token_ids), anatomy_of(self.loaded.model).catalogue.network.d_model)
        wrong = [layer for layer, acts in enumerate(self.acts) if tuple(acts.shape) != shape]
        bad = [layer for layer, acts in enumerate(self.acts) if not bool(acts.isfinite().all())]
        n_bad = sum(int((~acts.isfinite()).sum()) for acts in self.acts)
        max_abs = max(float(acts.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) for acts in self.acts)
        figures = {"n_non_finite": float(n_bad), "max_abs": max_abs}
        if wrong:
            message = f"Behind layer {wrong[0]} come {tuple(self.acts[wrong[0]].shape)} values, not {shape}."
            raise StepFound(ModelUnsupported(f"{message} Use another model."), figures)
        if bad:
            raise StepFound(
                NonFinite(
                    f"{n_bad} values are not finite, the first behind layer {bad[0]}; use dtype bfloat16 or float32.",
                    metadata={"hookpoint": f"blocks.{bad[0]}.hook_resid_post"},
                ),
                figures,
            )
        return f"{len(self.acts)} matrices of {shape[0]} x {shape[1]}", figures

    def parity(self) -> tuple[str, Figures]:
        """Loads the model again with plain transformers and compares the hidden states.

        The last hidden state is behind the final norm, so the last block is left out.
        """
        assert self.loaded is not None
        command = self.command
        files_path = Path(command.files_path)
        device, dtype = device_of(command.device), compute_dtype_of(command.device, command.dtype)
        n_layers = n_layers_of(self.loaded.model)
        # The device may have memory for one model only.
        self.loaded = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        arguments = from_pretrained_arguments(files_path, device, dtype, self.options)
        with out_of_memory_as_typed(device, 0), load_errors(files_path, stored_config(files_path)):
            plain = from_pretrained(files_path, arguments, command.quantization)
            with torch.inference_mode():
                ids = torch.tensor([self.token_ids], device=device)
                states = plain(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        compared = [difference(self.acts[layer], states[layer + 1][0].cpu()) for layer in range(n_layers - 1)]
        if not compared:
            return "a single layer, which transformers shows behind its norm only", {}
        figures = worst(compared)
        error = figures["max_relative_error"]
        if not error <= _MAX_RELATIVE_ERROR.get(dtype, _MAX_RELATIVE_ERROR_16):  # NaN is no match either.
            raise StepFound(
                ModelUnsupported(f"The residual stream differs from plain transformers by {error:.2g}; report a bug."),
                figures,
            )
        return f"layers 0 to {n_layers - 2} as in plain transformers", figures
