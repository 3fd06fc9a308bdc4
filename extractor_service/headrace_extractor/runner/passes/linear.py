"""Matrix products of linear layers on AMD processors, by oneDNN, which comes with torch.

For float32 on a CPU torch takes MKL's product, which on AMD's processors leaves AVX-512 unused: oneDNN's is faster by 5
to 20 %. Both round in float32, and their bits differ. The parity receipt compares with torch's own product: it is back
as soon as the block is left. `docs/adr/0011-linear-layers-on-amd.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_CPU_INFO = Path("/proc/cpuinfo")


@contextmanager
def fast_linear_layers(device: torch.device) -> Iterator[None]:
    """In the block, linear layers in float32 take oneDNN's product where that is faster: on some CPUs.

    `device` is the model's. The layers' classes are changed meanwhile: one block at a time, and inside of
    `torch.inference_mode`, since this product has no gradient.
    """
    if device.type != "cpu" or not onednn_is_faster():
        yield
        return
    own = nn.Linear.forward, Conv1D.forward
    try:
        nn.Linear.forward = _or_onednn(own[0], transposed=False)
        Conv1D.forward = _or_onednn(own[1], transposed=True)
        yield
    finally:
        nn.Linear.forward, Conv1D.forward = own


@cache
def onednn_is_faster() -> bool:
    """True on AMD processors with AVX-512, where torch would take MKL."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    return (
        backends.cpu.get_cpu_capability() == "AVX512" and _CPU_INFO.exists() and "AuthenticAMD" in _CPU_INFO.read_text()
    )


def _or_onednn(own: Callable[..., Tensor], *, transposed: bool) -> Callable[[Any, Tensor], Tensor]:
    """A `forward` by oneDNN, and by `own` for other dtypes and for weights in a form of their own."""

    def forward(layer: nn.Linear | Conv1D, inputs: Tensor) -> Tensor:
        weight = layer.weight
        if not (type(weight) is nn.Parameter and inputs.dtype == weight.dtype == torch.float32):
            return own(layer, inputs)
        matrix = weight.t() if transposed else weight
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, matrix, layer.bias, "none", [], "")  # noqa: SLF001
        return product

    return forward
