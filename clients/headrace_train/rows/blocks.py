"""Blocks of consecutive rows from a stream, and the filter that leaves out rows an SAE should not learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from headrace_client.values import BosPolicy, Packing, Recipe

POSITION = "position"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Consecutive rows: `acts` `[rows, d]` float32, which the caller may change, and `positions` `[rows]` int32."""

    first_row: int
    acts: torch.Tensor
    positions: torch.Tensor

    def __len__(self) -> int:
        return len(self.positions)


class Batches(Protocol):
    """An ActivationStream of more than one column."""

    @property
    def next_row(self) -> int:
        """One past the last row of the last batch."""

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Yields column name to tensor, rows in order."""


def read_blocks(batches: Batches, hookpoint: str) -> Iterator[RowBlock]:
    """Yields the batches of a stream with the number of their first row."""
    for batch in batches:
        positions = batch[POSITION]
        yield RowBlock(first_row=batches.next_row - len(positions), acts=batch[hookpoint], positions=positions)


class RowFilter:
    """Finds attention sinks and outliers among rows.

    Models park attention on the first position of their input. Its norm is a hundred times that of other positions: in
    a squared error such rows outweigh all others, and every feature "fires" on them.
    """

    def __init__(self, recipe: Recipe, *, drop_bos: bool, max_norm_multiple: float) -> None:
        # By the tokenizer's own rule there may be no BOS. If there is one and it is dropped, no row has position 0.
        bos_is_dropped = recipe.bos is BosPolicy.DOCUMENT and recipe.drop_special_tokens
        # The recipe may have left out first positions already.
        self.drop_bos = drop_bos and not (recipe.drop_first_positions > 0 or bos_is_dropped)
        self.norm_limit: float | None = None  # Set by `calibrate`.
        self._max_norm_multiple = max_norm_multiple
        # Rows of one sequence if all sequences have as many: then the row number tells where one begins. Else 0.
        # A document that is cut goes on in the next sequence, at a position other than 0.
        alike = recipe.packing is Packing.PACKED and not recipe.drop_special_tokens and recipe.window is None
        self._sequence_rows = recipe.context_size if alike else 0

    def calibrate(self, acts: torch.Tensor) -> None:
        """Sets the norm limit from a sample of rows, `[rows, d]`."""
        if self._max_norm_multiple:
            self.norm_limit = self._max_norm_multiple * float(norms(acts).median())

    def sinks(self, block: RowBlock) -> torch.Tensor:
        """Returns `[rows]` bool: true for the first position of a document and of a sequence."""
        if not self.drop_bos:
            return torch.zeros(len(block), dtype=torch.bool)
        mask = block.positions == 0
        if self._sequence_rows:
            mask[-block.first_row % self._sequence_rows :: self._sequence_rows] = True
        return mask

    def outliers(self, block: RowBlock) -> torch.Tensor:
        """Returns `[rows]` bool: true where the norm is beyond the limit."""
        if self.norm_limit is None:
            return torch.zeros(len(block), dtype=torch.bool)
        return norms(block.acts) > self.norm_limit

    def kept(self, block: RowBlock) -> torch.Tensor:
        """Returns the acts of the other rows; the block's own tensor, without a copy, if no row is left out."""
        return select(block.acts, ~(self.sinks(block) | self.outliers(block)))


def norms(rows: torch.Tensor) -> torch.Tensor:
    """Returns the norm of each row, `[rows]`."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths


def select(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the rows where `mask` is true, without a copy when it is true everywhere."""
    return rows if bool(mask.all()) else rows[mask]
