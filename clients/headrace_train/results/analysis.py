"""Statistics of each feature over the rows of the set: how often and how strongly it fires, and its strongest rows.

Two passes, both in batches: one over the activations for numbers and top rows, one over tokens, documents and
positions alone (12 bytes a row) for the text around the top rows. Memory grows with features, not with rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headrace_train.rows.blocks import RowBlock, RowFilter, select

# F features · N top rows of each · T top rows of all together · W tokens on each side

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """One value per feature, `[F]`. Means are over firings; 0 for a dead feature, which never fires."""

    n_firings: torch.Tensor
    mean: torch.Tensor
    maximum: torch.Tensor
    n_rows: int

    @property
    def frequency(self) -> torch.Tensor:
        """Share of rows on which each feature fires."""
        return self.n_firings.double() / max(1, self.n_rows)

    @property
    def dead(self) -> torch.Tensor:
        """True for features that never fire."""
        return self.n_firings == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TopRows:
    """`[T]` each, ordered by feature, then by rank; 1 is the strongest. Of equal activations the earlier row leads."""

    feature: torch.Tensor
    rank: torch.Tensor
    row: torch.Tensor
    activation: torch.Tensor


@dataclass(kw_only=True)
class RowCounts:
    """Numbers of rows: all, and the sinks and outliers that the statistics leave out."""

    n_rows: int = 0
    n_sinks: int = 0
    n_outliers: int = 0


class FeatureCounter:
    """Adds up the statistics over batches of rows."""

    def __init__(self, d_sae: int, n_top: int) -> None:
        self._n_top = n_top
        self._n_rows = 0
        self._n_firings = torch.zeros(d_sae, dtype=torch.long)
        self._sum = torch.zeros(d_sae, dtype=torch.float64)
        self._maximum = torch.zeros(d_sae)
        self._weakest_top = torch.zeros(d_sae)  # A feature with `n_top` rows takes only stronger ones.
        self._feature = torch.empty(0, dtype=torch.long)
        self._row = torch.empty(0, dtype=torch.long)
        self._activation = torch.empty(0)

    def add(self, rows: torch.Tensor, acts: torch.Tensor) -> None:
        """Takes feature activations `[R, F]` of rows `[R]`, which are higher than all rows before."""
        self._n_rows += len(rows)
        at, feature = acts.nonzero(as_tuple=True)
        activation = acts[at, feature].float().cpu()
        at, feature = at.cpu(), feature.cpu()
        firing = activation > 0
        at, feature, activation = at[firing], feature[firing], activation[firing]
        self._n_firings += torch.bincount(feature, minlength=len(self._n_firings))
        self._sum += torch.bincount(feature, weights=activation.double(), minlength=len(self._sum))
        self._maximum.scatter_reduce_(0, feature, activation, "amax")
        candidate = activation > self._weakest_top[feature]
        # Keeps the strongest `n_top` of each feature. Both sorts are stable: the earlier row wins a tie.
        all_feature = torch.cat([self._feature, feature[candidate]])
        all_row = torch.cat([self._row, rows[at[candidate]]])
        all_activation = torch.cat([self._activation, activation[candidate]])
        order = all_activation.argsort(descending=True, stable=True)
        order = order[all_feature[order].argsort(stable=True)]
        rank = _rank(all_feature[order])
        order, rank = order[rank < self._n_top], rank[rank < self._n_top]
        self._feature, self._row, self._activation = all_feature[order], all_row[order], all_activation[order]
        last = rank == self._n_top - 1
        self._weakest_top[self._feature[last]] = self._activation[last]

    def features(self) -> Features:
        """Returns the statistics so far."""
        return Features(
            n_firings=self._n_firings,
            mean=(self._sum / self._n_firings.clamp_min(1)).float(),
            maximum=self._maximum,
            n_rows=self._n_rows,
        )

    def top_rows(self) -> TopRows:
        """Returns the strongest rows so far."""
        return TopRows(feature=self._feature, rank=_rank(self._feature) + 1, row=self._row, activation=self._activation)


def _rank(sorted_values: torch.Tensor) -> torch.Tensor:
    """Returns for each element how many equal ones stand before it: 0 0 1 2 for a b b b."""
    counts = torch.unique_consecutive(sorted_values, return_counts=True)[1]
    first = counts.cumsum(0) - counts
    rank: torch.Tensor = torch.arange(len(sorted_values)) - first.repeat_interleave(counts)
    return rank


@torch.no_grad()
def count_features(
    sae: Any, blocks: Iterable[RowBlock], row_filter: RowFilter, counter: FeatureCounter
) -> Iterator[RowCounts]:
    """Encodes block by block into `counter`; yields the numbers of rows so far after each block."""
    counts = RowCounts()
    for block in blocks:
        sinks = row_filter.sinks(block)
        outliers = row_filter.outliers(block) & ~sinks
        counts.n_rows += len(block)
        counts.n_sinks += int(sinks.sum())
        counts.n_outliers += int(outliers.sum())
        fit = ~(sinks | outliers)
        rows = torch.arange(block.first_row, block.first_row + len(block))[fit]
        if len(rows):
            counter.add(rows, sae.encode(select(block.acts, fit).to(sae.device)))
        yield counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """Tokens around some rows, one line per row of the set.

    `token`, `document`, `position` are `[rows]`. `left` and `right` `[rows, W]` are token ids in reading order, −1
    beyond the ends of the document.
    """

    row: IntArray
    token: IntArray
    document: IntArray
    position: IntArray
    left: IntArray
    right: IntArray

    def token_ids(self) -> IntArray:
        """Returns the distinct token ids."""
        ids = np.unique(np.concatenate([self.token, self.left.ravel(), self.right.ravel()]))
        return ids[ids >= 0]


def find_contexts(batches: Iterable[Mapping[str, torch.Tensor]], rows: IntArray, n_tokens: int) -> Iterator[Contexts]:
    """Yields, batch by batch, the contexts of the next `rows` (sorted, each once) that have all their neighbours.

    `batches` hold `token_id`, `document` and `position` of all rows from 0 on.
    """
    held = {name: np.empty(0, dtype=np.int64) for name in ("token_id", "document", "position")}
    first_row = n_done = 0
    for batch in batches:
        held = {name: np.concatenate([held[name], batch[name].numpy()]) for name in held}
        end_row = first_row + len(held["token_id"])
        n_ready = int(np.searchsorted(rows, end_row - n_tokens))
        yield _contexts(held, rows[n_done:n_ready], first_row, n_tokens)
        n_done = n_ready
        keep_from = max(first_row, end_row - 2 * n_tokens)
        held = {name: column[keep_from - first_row :] for name, column in held.items()}
        first_row = keep_from
    yield _contexts(held, rows[n_done:], first_row, n_tokens)


def _contexts(held: Mapping[str, IntArray], rows: IntArray, first_row: int, n_tokens: int) -> Contexts:
    at = rows - first_row
    document = held["document"][at]
    return Contexts(
        row=rows,
        token=held["token_id"][at],
        document=document,
        position=held["position"][at],
        left=_neighbours(held, at[:, None] + np.arange(-n_tokens, 0), document),
        right=_neighbours(held, at[:, None] + np.arange(1, n_tokens + 1), document),
    )


def _neighbours(held: Mapping[str, IntArray], at: IntArray, document: IntArray) -> IntArray:
    """Returns the token ids at indices `at` into `held`; −1 outside the document."""
    inside = (at >= 0) & (at < len(held["token_id"]))
    safe = np.where(inside, at, 0)
    same = inside & (held["document"][safe] == document[:, None])
    return np.where(same, held["token_id"][safe], -1)
