"""From documents to batches of token ids, as the recipe says; plain numpy.

Batches are a pure function of (documents, recipe, special tokens, start), where `start` is a batch boundary: the batches
from `batch.next` on are the tail of the batches from the beginning, so a run resumes bit for bit.

PACKED fills sequences of `context_size` without padding; a document that does not fit goes on as a further *piece* in the
next sequence. ONE_DOCUMENT gives each document a sequence and a batch of its own and cuts off what exceeds the context.
The EOS token counts as the document's last token, the BOS token precedes every piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from extractor_service.errors import FieldInvalid
from extractor_service.recipe import ONE_DOCUMENT, Recipe

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class Documents(Protocol):
    """Documents as their own token ids, without BOS and EOS."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Int32Array: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The special token ids of a tokenizer. `ids` holds all of them, BOS and EOS among them."""

    bos_id: int | None = None
    eos_id: int | None = None
    ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        named = {token for token in (self.bos_id, self.eos_id) if token is not None}
        object.__setattr__(self, "ids", frozenset(self.ids) | named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where the next batch starts: document, the next of its tokens, the next position in its stream."""

    document: int = 0
    token: int = 0
    position: int = 0

    def to_json(self) -> dict[str, int]:
        """Returns it as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cursor:
        """Reads what `to_json` wrote."""
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One forward pass: `[B, S]` arrays, row-major order is the order of rows in the log.

    `positions` counts a document's stream with inserted tokens, `position_ids` is what the model is given. Rows exist
    where `keep` is true. `n_cut_off` counts own tokens that ONE_DOCUMENT left out.
    """

    token_ids: Int32Array
    position_ids: Int32Array
    documents: Int32Array
    positions: Int32Array
    keep: BoolArray
    start: Cursor
    next: Cursor
    n_cut_off: int = 0

    @property
    def n_rows(self) -> int:
        """Rows this batch adds to the log."""
        return int(np.count_nonzero(self.keep))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a corpus comes to under a recipe, exactly."""

    n_rows: int = 0
    n_tokens: int = 0  # through the model, inserted ones counted
    n_cut_off: int = 0  # own tokens that ONE_DOCUMENT leaves out
    n_documents_cut: int = 0
    n_empty_documents: int = 0


class _Piece(NamedTuple):
    """A document's part in one sequence: `tokens` own tokens from `token` on (EOS counted), `length` with its BOS."""

    document: int
    token: int
    tokens: int
    length: int
    position: int


class Packer:
    """Cuts `documents` into batches; raises FieldInvalid when the recipe wants an EOS token that isn't there."""

    def __init__(self, documents: Documents, recipe: Recipe, special: SpecialTokens) -> None:
        raise NotImplementedError

    def batches(self, start: Cursor = Cursor()) -> Iterator[TokenBatch]:
        """Yields the batches from `start` (0, or the `next` of a batch) to the end of the corpus."""
        raise NotImplementedError


def count_rows(documents: Documents, recipe: Recipe, special: SpecialTokens) -> tuple[int, int]:
    """Returns (rows, tokens through the model) of the whole corpus, exactly."""
    raise NotImplementedError
