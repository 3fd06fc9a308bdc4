"""Samples of a batch for the parity receipt: documents that will go through the model once more, by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from headrace_extractor.corpora.packing import TokenBatch

# Shorter documents say little. The beginning of longer ones is enough, if later tokens don't change it.
MIN_TOKENS = 16
MAX_TOKENS = 128


@dataclass(slots=True, kw_only=True)
class Sample:
    """A document in a batch: its tokens, and rows `[first_row, end_row)` of the batch, copied while they are stored."""

    token_ids: np.ndarray
    kept: np.ndarray  # Which of the tokens are rows.
    first_row: int
    document: int | None  # If it begins here.
    n_own: int  # Tokens of this document; others follow if they may see one another.
    stored: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def end_row(self) -> int:
        """One past its last row."""
        return self.first_row + int(np.count_nonzero(self.kept))


def choose(batch: TokenBatch, most_tokens: int | None, n_rows: int) -> Sample | None:
    """Returns the longest document of MIN_TOKENS to MAX_TOKENS behind another in its sequence, or the next best.

    A longer document is cut to its first `most_tokens`. None: later tokens change earlier rows, so a document stays
    whole. Only the first `n_rows` rows of the batch will be stored. Returns None for a batch without rows.
    """

    def rank(piece: _Piece) -> tuple[int, bool, bool, bool, int]:
        is_long = piece.length > MAX_TOKENS
        far = piece.length if is_long else -piece.length
        return piece.missed(n_rows), piece.length < MIN_TOKENS, piece.start == 0, is_long, far

    best = min(_pieces(batch), key=rank, default=None)
    return None if best is None else best.sample(batch, most_tokens)


def choose_longest(batch: TokenBatch, most_tokens: int, n_rows: int) -> Sample | None:
    """Returns the longest document of at most `most_tokens`, whole, if its rows will be stored."""
    fitting = [piece for piece in _pieces(batch) if piece.length <= most_tokens and not piece.missed(n_rows)]
    best = max(fitting, key=lambda piece: piece.length, default=None)
    return None if best is None else best.sample(batch, None)


def longest_in(batch: TokenBatch) -> int:
    """Returns the number of tokens of a batch's longest document."""
    return max((piece.length for piece in _pieces(batch)), default=0)


class _Piece(NamedTuple):
    """Tokens of a batch that see only themselves, from `start` to before `end` of a sequence; some of them are rows."""

    sequence: int
    start: int
    end: int
    n_kept: int
    end_row: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def missed(self, n_rows: int) -> int:
        """Returns a number above 0, the larger the later, if not all rows are among the first `n_rows`."""
        return 0 if self.end_row <= n_rows else 1 + self.end_row - self.n_kept

    def sample(self, batch: TokenBatch, most_tokens: int | None) -> Sample | None:
        """Returns the piece, or its first tokens, to be compared; None if no row is left."""
        end = self.end if most_tokens is None else min(self.end, self.start + most_tokens)
        here = (self.sequence, slice(self.start, end))
        if not batch.keep[here].any():
            return None
        documents = batch.documents[here]
        others = np.flatnonzero(documents != documents[0])
        return Sample(
            token_ids=batch.token_ids[here],
            kept=batch.keep[here],
            first_row=self.end_row - self.n_kept,
            document=int(documents[0]) if batch.positions[self.sequence, self.start] == 0 else None,
            n_own=int(others[0]) if others.size else len(documents),
        )


def _pieces(batch: TokenBatch) -> Iterator[_Piece]:
    """Yields the pieces of a batch that have rows."""
    rows_up_to = np.cumsum(batch.keep).reshape(batch.keep.shape)
    for sequence, positions in enumerate(batch.position_ids):
        # Position ids start again with each piece that sees only itself.
        for start, end in pairwise([*np.flatnonzero(positions == 0).tolist(), len(positions)]):
            n_kept = int(np.count_nonzero(batch.keep[sequence, start:end]))
            if n_kept:
                yield _Piece(sequence, start, end, n_kept, int(rows_up_to[sequence, end - 1]))
