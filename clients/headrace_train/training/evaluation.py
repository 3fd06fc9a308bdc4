"""Evaluation of an SAE on rows it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from headrace_client.errors import InvalidArgument
from headrace_train.rows.blocks import RowBlock, RowFilter

_MOST_ACTS_BYTES = 64 * 1024 * 1024
_MOST_HELD_OUT_BYTES = 64 * 1024 * 1024
_SAMPLE_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Explained variance 1 − Σ‖x−x̂‖² / Σ‖x−mean‖², mean squared error Σ‖x−x̂‖² / rows, L0 = active features a row."""

    explained_variance: float
    mse: float
    l0: float
    n_rows: int


def collect(blocks: Iterable[RowBlock], row_filter: RowFilter) -> torch.Tensor:
    """Returns the rows of some blocks that the filter keeps, `[rows, d]`."""
    return torch.cat([row_filter.kept(block) for block in blocks])


@torch.no_grad()
def evaluate(sae: Any, rows: torch.Tensor, *, scale: float = 1.0) -> Metrics:
    """Measures an SAE of SAELens on raw rows `[rows, d]`, which are multiplied by `scale` before they enter it."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    residual = variance = n_active = 0.0
    was_training = sae.training
    sae.eval()
    for part in torch.split(rows, batch_rows(sae)):
        acts = sae.encode((part * scale).to(sae.device))
        output = sae.decode(acts).float().cpu() / scale
        residual += float((part - output).square().sum(dtype=torch.float64))
        variance += float((part - mean).square().sum())
        n_active += float((acts != 0).sum())
    sae.train(was_training)
    return Metrics(
        explained_variance=1 - residual / variance if variance else 0.0,
        mse=residual / len(rows),
        l0=n_active / len(rows),
        n_rows=len(rows),
    )


def batch_rows(sae: Any) -> int:
    """Returns how many rows to encode at once: their features, `[rows, d_sae]`, stay within 64 MiB, but for 64 rows."""
    return int(min(4096, max(64, _MOST_ACTS_BYTES // (sae.cfg.d_sae * 4))))


def held_out_rows(n_rows: int, d_in: int) -> int:
    """Returns how many of the set's last rows are held out: 5 %, at most 8192 rows and 64 MiB."""
    return max(1, min(n_rows // 20, 8192, _MOST_HELD_OUT_BYTES // (d_in * 4)))


class HeldOut:
    """The set's last rows, read once, when they have been committed: training does not wait for them."""

    def __init__(
        self, open_blocks: Callable[[], Iterable[RowBlock]], row_filter: RowFilter, *, n_rows: int, n_held_out: int
    ) -> None:
        self._open_blocks = open_blocks
        self._filter = row_filter
        self._n_rows = n_rows
        self._n_held_out = n_held_out
        self._rows: torch.Tensor | None = None

    def rows(self, n_rows_committed: int | None = None) -> torch.Tensor | None:
        """Returns the held-out rows `[rows, d]`, or None while `n_rows_committed` says that they are not committed.

        None for `n_rows_committed` waits for them; 0 returns them only if they were read before.
        """
        if self._rows is None and (n_rows_committed is None or n_rows_committed >= self._n_rows):
            rows = collect(self._open_blocks(), self._filter)
            if not len(rows):
                raise InvalidArgument(
                    f"none of the {self._n_held_out} rows held out for evaluation is fit",
                    remedy="extract more rows, or take --no-drop-bos and --max-norm-multiple 0",
                )
            self._rows = rows
        return self._rows

    def sample(self, n_rows_committed: int) -> torch.Tensor | None:
        """Returns some held-out rows, evenly spaced: evaluating all each time would cost a fifth of the training."""
        rows = self.rows(n_rows_committed)
        return None if rows is None else rows[:: -(-len(rows) // _SAMPLE_ROWS)]
