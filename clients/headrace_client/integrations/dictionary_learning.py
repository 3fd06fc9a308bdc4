"""Streams for dictionary_learning: `trainSAE(data=buffer(...), ...)`.

An ActivationStream is such a buffer: it yields fresh `[batch, d]` tensors, and its `config` is saved with the SAE.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from headrace_client.client import HeadraceClient
from headrace_client.extras import needing
from headrace_client.reading.scaling import dictionary_learning_norm
from headrace_client.reading.tensors import ActivationStream
from headrace_client.values import Extraction


def buffer(
    client: HeadraceClient,
    extraction: Extraction | str,
    hookpoint: str | None = None,
    batch_size: int = 4096,
    epochs: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ActivationStream:
    """Returns the `data` of trainSAE, which ends when the data end: `epochs` None reads a small set again and again.

    Short batches are left out. `options` go to `HeadraceClient.activations`. Use it in a `with` block.
    """
    known = client.extractions.get(extraction) if isinstance(extraction, str) else extraction
    return client.activations(
        known,
        columns=hookpoint or known.hookpoints[0],
        batch_size=batch_size,
        epochs=epochs,
        dtype=dtype,
        drop_last=True,
        **options,
    )


@contextmanager
def known_norm(stream: ActivationStream) -> Iterator[float]:
    """Within it, `trainSAE(..., normalize_activations=True)` takes the norm factor from the stream's statistics.

    Otherwise trainSAE draws about a hundred batches to estimate it. Waits for the stream's header; raises
    FailedPrecondition if the header has no statistics yet. Not for several threads that train at once.
    """
    norm = dictionary_learning_norm(stream.header, stream.config["columns"][0])
    with needing("dictionary-learning"):  # It needs nnsight to import, which `--no-deps` leaves out.
        training: Any = importlib.import_module("dictionary_learning.training")
    estimate = training.get_norm_factor
    training.get_norm_factor = lambda _data, steps=0: norm  # noqa: ARG005 -- its name
    try:
        yield norm
    finally:
        training.get_norm_factor = estimate
