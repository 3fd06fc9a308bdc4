"""What quantization changed in a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """How far the residual stream behind a layer is from the unquantized model's, over all positions.

    `cosine` is the mean over positions, `relative_error` the norm of the difference by the norm of the reference.
    """

    layer: int
    cosine: float
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """A quantized model compared with the unquantized one in `reference_dtype`, on a fixed text of `n_tokens`."""

    reference_dtype: str
    n_tokens: int
    layers: tuple[LayerFidelity, ...]
