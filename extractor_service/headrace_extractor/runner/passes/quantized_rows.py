"""8-bit rows: each row is divided by a float32 scale of its own, so that its largest value uses the whole range.

A row is quantized by its own values alone. A row of zeros has scale 0. A row with a value that is not finite has scale
NaN, so that none of its elements can be read by mistake.
"""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# R rows · D model width

from __future__ import annotations

import torch
from torch import Tensor

# Largest value of each dtype; -128 is not used, so that signs are symmetric.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(acts_RD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns `[R, D]` values of an 8-bit dtype and `[R, 1]` float32 scales; their product is close to `acts_RD`."""
    acts_RD = acts_RD.float()
    lowest_R1, highest_R1 = torch.aminmax(acts_RD, dim=1, keepdim=True)  # NaN if a row has one.
    scale_R1 = torch.maximum(highest_R1, -lowest_R1) / LARGEST[dtype]
    values_RD = (acts_RD / torch.where(scale_R1 > 0, scale_R1, 1)).nan_to_num_(0)
    values_RD = values_RD.clamp_(-LARGEST[dtype], LARGEST[dtype])
    if dtype == torch.int8:
        values_RD = values_RD.round_()
    return values_RD.to(dtype), torch.where(scale_R1.isfinite(), scale_R1, torch.nan)


def dequantize_rows(values_RD: Tensor, scale_R1: Tensor) -> Tensor:
    """Returns `[R, D]` float32: the inverse of `quantize_rows`, up to rounding."""
    return values_RD.float() * scale_R1
