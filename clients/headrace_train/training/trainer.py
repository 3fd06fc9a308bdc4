"""SAELens' SAETrainer, fed by a MixingProvider, with a callback after each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata

from headrace_client.errors import InvalidArgument
from headrace_train.arguments import USES_K, Arguments
from headrace_train.rows.blocks import norms
from headrace_train.rows.provider import MixingProvider

_COEFFICIENTS = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}
_WARM_UPS = {"standard": "l1_warm_up_steps", "gated": "l1_warm_up_steps", "jumprelu": "l0_warm_up_steps"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Figures of one step, of its batch; the loss is in the trainer's scaling."""

    loss: float
    l0: float
    explained_variance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """An SAE after `fit`, with the scaling by `scale` folded in. `interrupted`: Ctrl-C ended the training early."""

    sae: Any
    n_rows: int
    n_steps: int
    scale: float
    seconds: float
    wait_s: float
    interrupted: bool


OnStep = Callable[["WatchedTrainer", Any], None]  # The second argument is the output of SAELens' step.


class WatchedTrainer(SAETrainer):  # type: ignore[misc]  # SAELens has no types.
    """SAELens' trainer, with a callback after each step."""

    def __init__(self, *args: Any, on_step: OnStep, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_step = on_step

    @property
    def scale(self) -> float:
        """The factor by which rows are multiplied before they enter the SAE."""
        return self.activation_scaler.scaling_factor or 1.0

    def step(self, batch: torch.Tensor) -> Any:
        """Does one training step."""
        output = super().step(batch)
        self._on_step(self, output)
        return output


def new_trainer(
    arguments: Arguments,
    provider: MixingProvider,
    *,
    metadata: dict[str, Any],
    device: str,
    on_step: OnStep,
) -> WatchedTrainer:
    """Makes SAE and trainer; estimates scaling and decoder bias from the first rows of the stream."""
    sample = provider.warm()
    n_steps = math.ceil(arguments.rows / arguments.batch_size)
    torch.manual_seed(arguments.seed)
    sae = _new_sae(arguments, d_in=sample.shape[1], n_steps=n_steps, metadata=metadata, device=device)
    trainer = WatchedTrainer(_trainer_config(arguments, n_steps, device), sae, provider, on_step=on_step)
    if arguments.normalize == "expected_average_only_in":
        # With a factor set, SAELens neither draws batches for an estimate of its own nor changes this one.
        trainer.activation_scaler.scaling_factor = math.sqrt(sample.shape[1]) / float(norms(sample).mean())
    with torch.no_grad():
        # Rows lie far from the origin, around their mean: from a bias of zero, a short training would only get there.
        sae.b_dec.copy_(sample.mean(dim=0) * trainer.scale)
    return trainer


def fit(trainer: WatchedTrainer, provider: MixingProvider) -> Trained:
    """Trains to the end, or until Ctrl-C. Raises KeyboardInterrupt if that came before the first step."""
    started, scale, interrupted = time.monotonic(), trainer.scale, False
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if not trainer.n_training_steps:
            raise
        interrupted = True
        # The end of SAELens' `fit`, which the interrupt skipped.
        scaler = trainer.activation_scaler
        if scaler.scaling_factor is not None:
            trainer.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        trainer.set_final_sae_metadata()
    return Trained(
        sae=trainer.sae,
        n_rows=trainer.n_training_samples,
        n_steps=trainer.n_training_steps,
        scale=scale,
        seconds=time.monotonic() - started,
        wait_s=provider.wait_s,
        interrupted=interrupted,
    )


@torch.no_grad()
def measure(output: Any) -> Step:
    """Computes figures from the output of SAELens' step."""
    rows = output.sae_in
    residual = (rows - output.sae_out).square().sum()
    variance = (rows - rows.mean(dim=0)).square().sum().clamp_min(1e-12)
    return Step(
        loss=float(output.loss),
        l0=float((output.feature_acts != 0).sum()) / len(rows),
        explained_variance=float(1 - residual / variance),
    )


def d_sae_of(arguments: Arguments, d_in: int) -> int:
    """Returns the number of features. Raises InvalidArgument if it is less than `k`."""
    d_sae = arguments.d_sae or arguments.expansion * d_in
    if arguments.architecture in USES_K and arguments.k > d_sae:
        raise InvalidArgument(
            f"k is {arguments.k}, but the SAE has {d_sae} features: take a smaller --k or a larger --d-sae",
            fields={"k": f"at most {d_sae}"},
        )
    return d_sae


def choose_device(wanted: str) -> str:
    """Returns a torch device that works; `auto` is the best one. Raises InvalidArgument if `wanted` does not work."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted).cpu()
    except (RuntimeError, AssertionError) as exc:  # AssertionError: this torch has no CUDA.
        reason = str(exc).splitlines()[0]
        raise InvalidArgument(
            f"device {wanted!r} can't be used: {reason}", fields={"device": wanted}, remedy="take --device cpu"
        ) from exc
    return wanted


def _new_sae(arguments: Arguments, *, d_in: int, n_steps: int, metadata: dict[str, Any], device: str) -> Any:
    kind, config_kind = get_sae_training_class(arguments.architecture)
    options: dict[str, Any] = {}
    if arguments.architecture in USES_K:
        options["k"] = arguments.k
        if arguments.architecture == "batchtopk":
            # The threshold for inference is a moving average that begins at 0: it must converge within the run.
            options["topk_threshold_lr"] = min(0.2, max(0.01, 10 / n_steps))
    else:
        options[_WARM_UPS[arguments.architecture]] = n_steps // 10
        if arguments.sparsity is not None:
            options[_COEFFICIENTS[arguments.architecture]] = arguments.sparsity
    config = config_kind(
        d_in=d_in,
        d_sae=d_sae_of(arguments, d_in),
        device=device,
        normalize_activations=arguments.normalize,
        metadata=SAEMetadata(**metadata),
        **options,
    )
    return kind(config)


def _trainer_config(arguments: Arguments, n_steps: int, device: str) -> Any:
    return SAETrainerConfig(
        total_training_samples=n_steps * arguments.batch_size,
        train_batch_size_samples=arguments.batch_size,
        lr=arguments.lr,
        lr_end=arguments.lr / 10,
        lr_warm_up_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        device=device,
        # SAELens' default is for runs of a hundred thousand steps; dead features of a short run must show earlier.
        dead_feature_window=min(1000, max(10, n_steps // 8)),
        logger=LoggingConfig(log_to_wandb=False),
    )
