"""Statistics of stored rows, in float64."""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# R rows · D model width

from __future__ import annotations

import torch
from torch import Tensor

from headrace_extractor.runner.passes.rows import TORCH_DTYPES
from headrace_log.layout import ColumnSpec
from headrace_log.statistics import ColumnStatistics

# torch divides operations on more elements (at::internal::GRAIN_SIZE) among OpenMP's threads, which are busy with the
# forward pass: then they take tens of times longer. A block of this many float64 also stays in a core's own cache.
_BLOCK_ELEMENTS = 32_000


@torch.inference_mode()
def summarize(column: ColumnSpec, rows: memoryview, scales: memoryview | None) -> ColumnStatistics:
    """Sums up rows in memory in one pass, block by block; see `headrace_log.statistics.Summarize`."""
    stored_RD = torch.frombuffer(rows, dtype=TORCH_DTYPES[column.dtype]).view(-1, column.width)
    scales_R1 = torch.frombuffer(scales, dtype=torch.float32).view(-1, 1) if scales is not None else None
    at_once = max(1, _BLOCK_ELEMENTS // column.width)
    scratch_RD = torch.empty(at_once, column.width, dtype=torch.float64)
    total = _Total(column.width)
    for at in range(0, len(stored_RD), at_once):
        block_RD = scratch_RD[: len(stored_RD) - at].copy_(stored_RD[at : at + at_once])
        if scales_R1 is not None:
            block_RD.mul_(scales_R1[at : at + at_once])
        total.add(block_RD)
    return total.statistics()


class _Total:
    """Sums so far, merged block by block (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._mean_D = torch.zeros(width, dtype=torch.float64)
        self._m2_D = torch.zeros(width, dtype=torch.float64)
        self._norm = torch.zeros((), dtype=torch.float64)
        self._squared_norm = torch.zeros((), dtype=torch.float64)

    def add(self, block_RD: Tensor) -> None:
        """Adds rows; overwrites the block, which saves a copy."""
        n_rows = len(block_RD)
        norms_R = torch.linalg.vector_norm(block_RD, dim=1)
        self._norm += norms_R.sum()
        self._squared_norm += norms_R.square_().sum()
        mean_D = block_RD.sum(0).div_(n_rows)
        self._m2_D += block_RD.sub_(mean_D).square_().sum(0)
        delta_D, total = mean_D.sub_(self._mean_D), self._count + n_rows
        self._mean_D += delta_D * (n_rows / total)
        self._m2_D += delta_D.square_().mul_(self._count * n_rows / total)
        self._count = total

    def statistics(self) -> ColumnStatistics:
        """Returns the statistics of all blocks together."""
        return ColumnStatistics(
            count=self._count,
            mean=self._mean_D.numpy(),
            m2=self._m2_D.numpy(),
            mean_norm=self._norm.item() / self._count,
            mean_squared_norm=self._squared_norm.item() / self._count,
        )
