"""Streams as SAELens wants them: an endless iterator of raw `[batch, d]` float32 tensors for `SAETrainer`."""

from __future__ import annotations

import torch

from headrace_client.client import HeadraceClient
from headrace_client.tensors import ActivationStream
from headrace_client.values import Extraction


def data_provider(
    client: HeadraceClient,
    extraction: Extraction | str,
    hookpoint: str | None = None,
    batch_size: int = 4096,
    epochs: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    start_row: int = 0,
) -> ActivationStream:
    """Returns the `data_provider` of an SAETrainer whose `train_batch_size_samples` is `batch_size`.

    SAETrainer does not handle the end of its data: with `epochs` None, the default, there is none, and a set that is
    too small is read again. It draws batches for its norm estimate and for evaluation beyond
    `total_training_samples`. Short batches are left out. Close it, or use it in a `with` block.
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
    )
