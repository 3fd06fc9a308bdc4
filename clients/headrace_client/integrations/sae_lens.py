"""Streams for SAELens: endless iterators of raw float32 batches for `SAETrainer` and `MultiSAETrainer`.

`set_scaling` gives a trainer the factor that it would otherwise estimate from a thousand batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from headrace_client.client import HeadraceClient
from headrace_client.reading.scaling import sae_lens_factor
from headrace_client.reading.tensors import ActivationStream
from headrace_client.values import Extraction

# The only normalization of SAELens for which a factor is estimated.
_BY_FACTOR = "expected_average_only_in"


def data_provider(
    client: HeadraceClient,
    extraction: Extraction | str,
    hookpoint: str | None = None,
    batch_size: int = 4096,
    epochs: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    start_row: int = 0,
    **options: Any,
) -> ActivationStream:
    """Returns the `data_provider` of an SAETrainer with `train_batch_size_samples=batch_size`.

    SAETrainer does not handle the end of its data: with `epochs` None, the default, a small set is read again and
    again. It draws batches for evaluation beyond `total_training_samples`, and for its norm estimate unless
    `set_scaling` was called. Short batches are left out. `options` go to `HeadraceClient.activations`. Close it,
    or use it in a `with` block.
    """
    known = client.extractions.get(extraction) if isinstance(extraction, str) else extraction
    return client.activations(
        known,
        columns=hookpoint or known.hookpoints[0],
        batch_size=batch_size,
        epochs=epochs,
        dtype=dtype,
        start_row=start_row,
        drop_last=True,
        **options,
    )


class MultiDataProvider:
    """The `data_provider` of a MultiSAETrainer: dicts of batches of the same rows, by hookpoint."""

    def __init__(self, stream: ActivationStream, hookpoints: Sequence[str]) -> None:
        self.stream = stream
        self._hookpoints = tuple(hookpoints)

    def close(self) -> None:
        """Ends the stream."""
        self.stream.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self.stream)
        return batch if isinstance(batch, dict) else {self._hookpoints[0]: batch}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def multi_data_provider(
    client: HeadraceClient,
    extraction: Extraction | str,
    hookpoints: Sequence[str] | None = None,
    batch_size: int = 4096,
    epochs: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> MultiDataProvider:
    """Returns the `data_provider` of a MultiSAETrainer; by default with all hookpoints. See `data_provider`."""
    known = client.extractions.get(extraction) if isinstance(extraction, str) else extraction
    names = tuple(hookpoints or known.hookpoints)
    stream = client.activations(
        known, columns=names, batch_size=batch_size, epochs=epochs, dtype=dtype, drop_last=True, **options
    )
    return MultiDataProvider(stream, names)


def set_scaling(trainer: Any, provider: ActivationStream | MultiDataProvider) -> None:
    """Gives an SAETrainer or MultiSAETrainer its scaling factors from the statistics of the set it will read.

    Nothing happens where the SAE does not normalize by a factor, or has a factor from a checkpoint. Waits for the
    stream's header; raises FailedPrecondition if the header has no statistics yet.
    """
    if isinstance(provider, MultiDataProvider):
        for name, one in trainer.trainers.items():
            _set_factor(one, provider.stream, trainer.hook_names[name])
        return
    _set_factor(trainer, provider, provider.config["columns"][0])


def _set_factor(trainer: Any, stream: ActivationStream, hookpoint: str) -> None:
    scaler = trainer.activation_scaler
    if trainer.sae.cfg.normalize_activations == _BY_FACTOR and scaler.scaling_factor is None:
        scaler.scaling_factor = sae_lens_factor(stream.header, hookpoint)
