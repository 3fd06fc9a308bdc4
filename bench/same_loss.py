"""Loss curves of one SAE, which SAELens trains on rows from the stream and on rows that it computes itself.

SmolLM2-135M, layer 14, float32; texts as token ids, each exactly a context long, so that both sides have the same rows
in the same order: SAELens' own ActivationsStore over the same ids, without mixing. Both start from the same weights.
Each side scales in its own way: SAELens by its estimate over all batches, Headrace by the statistics in the stream's
header.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from bench.end_to_end import HOOKPOINT, MODEL_ID, Services, start_services
from bench.figures import Figure
from bench.text import LAYER, paragraphs
from headrace_client import Recipe
from headrace_client.integrations.sae_lens import data_provider, set_scaling

CONTEXT_SIZE = 256
SEQUENCES = 4  # Per forward pass, on both sides.
BATCH_ROWS = 256
EXPANSION = 4
TARGET = 1.02


def measure(work_dir: Path, console: Console, *, n_contexts: int) -> list[Figure]:
    """Returns two figures: the step at which the curves are farthest apart, and the last steps."""
    with ExitStack() as stack:
        console.print("same loss: starting services, converting the model")
        services = start_services(stack, work_dir)
        contexts = _contexts(services.files_path, n_contexts)
        console.print(f"same loss: {len(contexts) * CONTEXT_SIZE:,} rows by SAELens, in this process")
        own = _curve(*_in_process(services.files_path, contexts), console)
        console.print("same loss: the same rows from the stream")
        streamed = _curve(*stack.enter_context(_Streamed(services, contexts)).trainer_and_length, console)
    pairs = list(zip(streamed, own, strict=True))
    ours, theirs = max(pairs, key=lambda pair: max(pair[0] / pair[1], pair[1] / pair[0]))
    ends = [sum(curve[-8:]) / 8 for curve in (streamed, own)]
    console.print(f"  {len(pairs)} steps; loss from {own[0]:.4g} to {ends[1]:.4g}; in the stream {ends[0]:.4g}")
    return [
        _figure("SAE loss, worst step", max(ours, theirs), min(ours, theirs)),
        _figure("SAE loss, last steps", max(ends), min(ends)),
    ]


def _figure(name: str, a: float, b: float) -> Figure:
    return Figure(name=name, ratio=a / b, target=TARGET, sense="max", unit="loss", a=a, b=b)


def _contexts(files_path: str, n_contexts: int) -> list[list[int]]:
    from tokenizers import Tokenizer  # noqa: PLC0415 -- for this benchmark only

    ids = Tokenizer.from_file(str(Path(files_path) / "tokenizer.json")).encode("\n\n".join(paragraphs())).ids
    whole = len(ids) // CONTEXT_SIZE
    return [ids[at * CONTEXT_SIZE : (at + 1) * CONTEXT_SIZE] for at in range(min(n_contexts, whole))]


def _in_process(files_path: str, contexts: list[list[int]]) -> tuple[Any, int]:
    """Makes a SAELens trainer on SAELens' store. Its batches are kept in a list: the scaling estimate uses them too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset  # noqa: PLC0415
        from sae_lens.load_model import load_model  # noqa: PLC0415
        from sae_lens.training.activations_store import ActivationsStore  # noqa: PLC0415

        model = load_model(
            "AutoModelForCausalLM",
            files_path,
            device="cpu",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            hook_names=[f"model.layers.{LAYER}"],
        )
        store = ActivationsStore(
            model=model,
            dataset=Dataset.from_dict({"input_ids": contexts}),
            streaming=False,
            hook_name=f"model.layers.{LAYER}",
            hook_head_index=None,
            context_size=CONTEXT_SIZE,
            d_in=model.model.config.hidden_size,
            n_batches_in_buffer=SEQUENCES,
            total_training_tokens=len(contexts),
            store_batch_size_prompts=SEQUENCES,
            train_batch_size_tokens=BATCH_ROWS,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            activations_mixing_fraction=0.0,
        )
        n_steps = len(contexts) * CONTEXT_SIZE // BATCH_ROWS
        batches = [next(store).clone() for _ in range(n_steps)]
    trainer = _trainer(iter(batches), n_steps, batches[0].shape[1])
    trainer.activation_scaler.estimate_scaling_factor(batches[0].shape[1], iter(batches), n_steps)
    return trainer, n_steps


class _Streamed:
    """A SAELens trainer on an extraction of the same token ids."""

    def __init__(self, services: Services, contexts: list[list[int]]) -> None:
        self._client = services.client
        self._contexts = contexts

    def __enter__(self) -> Self:
        corpus = self._client.corpora.register_token_ids("same-rows", self._contexts)
        recipe = Recipe(context_size=CONTEXT_SIZE, batch_size=SEQUENCES, bos="none", eos="none")
        extraction = self._client.extractions.start(MODEL_ID, corpus.id, HOOKPOINT, recipe=recipe)
        done = self._client.extractions.wait(extraction.id)
        self._provider = data_provider(self._client, done, HOOKPOINT, batch_size=BATCH_ROWS)
        n_steps = done.n_rows // BATCH_ROWS
        trainer = _trainer(self._provider, n_steps, self._provider.header.columns[0].width)
        set_scaling(trainer, self._provider)
        self.trainer_and_length = trainer, n_steps
        return self

    def __exit__(self, *_: object) -> None:
        self._provider.close()


def _trainer(provider: Iterator[torch.Tensor], n_steps: int, d_in: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig  # noqa: PLC0415
        from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: PLC0415
        from sae_lens.training.sae_trainer import SAETrainer  # noqa: PLC0415
    torch.manual_seed(0)
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=d_in,
            d_sae=EXPANSION * d_in,
            l1_coefficient=2.0,
            normalize_activations="expected_average_only_in",
            device="cpu",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=n_steps * BATCH_ROWS,
        train_batch_size_samples=BATCH_ROWS,
        lr=4e-4,
        lr_end=4e-5,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, provider)


def _curve(trainer: Any, n_steps: int, console: Console) -> list[float]:
    console.print(f"  rows are multiplied by {trainer.activation_scaler.scaling_factor!r}")
    losses: list[float] = []
    step = trainer.step

    def recorded(batch: torch.Tensor) -> Any:
        output = step(batch)
        losses.append(float(output.loss.detach()))
        return output

    trainer.step = recorded
    trainer.fit()
    assert len(losses) == n_steps, "SAELens took another number of batches"
    return losses
