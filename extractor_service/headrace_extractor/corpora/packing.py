"""Packs documents into batches of token ids under a recipe; plain numpy.

Batches are a pure function of (documents, recipe, special tokens, start), where `start` is a batch boundary: the
batches from `batch.next` on are the tail of the batches from the beginning, so a run resumes bit for bit.

PACKED fills sequences of `context_size` without padding; a document that does not fit goes on as a further *piece* in
the next sequence. ONE_DOCUMENT gives each piece a sequence and a batch of its own. TRUNCATE cuts a document to the
tokens that one sequence can hold; SPLIT keeps all of its tokens. A prefix, such as the BOS token, precedes every piece;
a suffix, such as BERT's [SEP], ends the document, also one that is truncated. An EOS token that the recipe asks for
counts as a document's last token. Documents without tokens of their own are skipped and keep their index.

With a window of positions, sequences without any row never reach the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace_extractor.corpora.recipe import BY_TOKENIZER, ONE_DOCUMENT, TRUNCATE, Recipe
from headrace_extractor.errors import FieldInvalid

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class Documents(Protocol):
    """Documents as their own token ids, without those that the recipe inserts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Int32Array: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The special token ids of a tokenizer; `ids` holds all of them, also those of the other fields.

    `prefix` and `suffix` are what the tokenizer puts around one text. `written`: documents have both already, where
    their tokenizer or chat template wants them, and only further pieces are given the prefix.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    ids: frozenset[int] = field(default_factory=frozenset)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    written: bool = False

    def __post_init__(self) -> None:
        named = {token for token in (self.bos_id, self.eos_id) if token is not None}
        object.__setattr__(self, "ids", frozenset(self.ids) | named | {*self.prefix, *self.suffix})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The start of a batch: a document, the first of its tokens to pack, and the position of the piece they begin."""

    document: int = 0
    token: int = 0
    position: int = 0

    def to_json(self) -> dict[str, int]:
        """Returns the cursor as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cursor:
        """Reads what `to_json` wrote."""
        return cls(**value)


_START = Cursor()
_NOTHING = np.empty(0, dtype=np.int32)
# When a window leaves out so many tokens in a row, `stop` is asked although there is no batch to yield.
_MAX_LEFT_OUT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One forward pass: `[B, S]` arrays, row-major order is the order of rows in the log.

    `positions` are a document's positions with inserted tokens counted, `position_ids` the model's input. Tokens with
    `keep` become rows. `n_cut_off` counts the own tokens that TRUNCATE cut off documents that end in this batch.
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

    def trimmed(self) -> TokenBatch:
        """Returns the same rows without the columns after the last row: a causal model does not need those tokens."""
        kept = np.flatnonzero(self.keep.any(axis=0))
        if not kept.size or kept[-1] + 1 == self.keep.shape[1]:
            return self
        end = int(kept[-1]) + 1
        return replace(
            self,
            token_ids=self.token_ids[:, :end],
            position_ids=self.position_ids[:, :end],
            documents=self.documents[:, :end],
            positions=self.positions[:, :end],
            keep=self.keep[:, :end],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Exact counts for the first `n_documents` documents of a corpus under a recipe."""

    n_documents: int = 0
    n_rows: int = 0
    n_tokens: int = 0  # through the model, inserted ones counted
    n_cut_off: int = 0  # own tokens that TRUNCATE leaves out
    n_documents_cut: int = 0


class Packer:
    """Cuts `documents` into batches; raises FieldInvalid if the recipe inserts an EOS token that the model lacks."""

    def __init__(self, documents: Documents, recipe: Recipe, special: SpecialTokens) -> None:
        check_special(recipe, special)
        self._documents = documents
        self._recipe = recipe
        around = _Around.of(recipe, special)
        inserted = (around.first, around.again, around.tail)
        self._first, self._again, self._tail = (np.array(ids, dtype=np.int32) for ids in inserted)
        # What TRUNCATE leaves of a document: of its whole stream, and of its own tokens.
        truncates = recipe.long_documents == TRUNCATE
        self._longest = recipe.context_size - self._first.size if truncates else None
        self._longest_own = recipe.context_size - self._first.size - len(around.suffix) if truncates else None
        # Indexed with min(token id, last index); the last entry stands for all ids beyond the special ones.
        self._special = np.zeros(max(special.ids, default=0) + 2, dtype=np.bool_)
        self._special[list(special.ids)] = True
        self._alone = recipe.packing == ONE_DOCUMENT
        # Index and tokens of the last document read: a document may span many sequences.
        self._held: tuple[int, Int32Array] = (-1, _NOTHING)

    def batches(self, start: Cursor = _START, *, stop: Callable[[], bool] = lambda: False) -> Iterator[TokenBatch]:
        """Yields the batches from `start` (the beginning, or `next` of a batch) to the end of the corpus.

        Asks `stop` now and then while a window leaves out many sequences in a row, and ends when it returns true.
        """
        for plan in self._plans(start):
            if plan.n_sequences:
                yield self._batch(plan)
            elif stop():
                return

    def count(self, *, max_rows: int = 0, stop: Callable[[], bool] = lambda: False) -> Counts:
        """Counts the whole corpus, or the batches up to `max_rows` (0: all), or until `stop` returns true."""
        counts = Counts()
        for counts in self.counts(max_rows=max_rows, pause=stop):  # noqa: B007 -- the last one counts
            if stop():
                break
        return counts

    def counts(self, *, max_rows: int = 0, pause: Callable[[], bool] = lambda: False) -> Iterator[Counts]:
        """Yields the counts so far after each batch, and after any sequence where `pause` returns true.

        Ends with the corpus, or with the batch that reaches `max_rows` (0: all). Builds no arrays, unless special
        tokens are dropped: otherwise lengths are enough.
        """
        counts = Counts()
        n_rows = n_tokens = n_cut_off = n_documents_cut = 0
        for plan in self._plans(_START, cut=pause):
            n_tokens += sum(piece.length for piece in plan.pieces)
            if self._recipe.drop_special_tokens and plan.n_sequences:
                n_rows += self._batch(plan).n_rows
            else:
                n_rows += sum(max(0, piece.kept_end - piece.kept_start) for piece in plan.pieces)
            n_cut_off += plan.n_cut_off
            n_documents_cut += plan.n_documents_cut
            counts = Counts(
                n_documents=plan.next.document,
                n_rows=n_rows,
                n_tokens=n_tokens,
                n_cut_off=n_cut_off,
                n_documents_cut=n_documents_cut,
            )
            yield counts
            if 0 < max_rows <= n_rows:
                return
        yield replace(counts, n_documents=len(self._documents))

    def _plans(self, start: Cursor, *, cut: Callable[[], bool] = lambda: False) -> Iterator[_Plan]:
        """Groups sequences: full ones by `batch_size`, the shorter last one of the corpus by itself.

        A group ends early where `cut` returns true.
        """
        size = 1 if self._alone else self._recipe.batch_size
        group = _Group(start)
        while True:
            sequence, cursor, full = self._fill(start)
            if not sequence:
                break
            start = cursor
            complete = full or self._alone
            if group.n_sequences and not complete:
                yield group.take()
            has_rows = self._recipe.window is None or any(piece.kept_start < piece.kept_end for piece in sequence)
            group.add(sequence, cursor, needed=has_rows)
            if self._longest is not None:
                group.count_cut_off(sequence)
            if group.n_sequences == size or group.n_left_out >= _MAX_LEFT_OUT or not complete or cut():
                yield group.take()
        if group.n_sequences or group.n_left_out:
            yield group.take()

    def _fill(self, cursor: Cursor) -> tuple[list[_Piece], Cursor, bool]:
        """Cuts one sequence: one piece for ONE_DOCUMENT, else until it is full or the corpus ends.

        Returns its pieces, the start of the next sequence, and whether this one is full.
        """
        pieces: list[_Piece] = []
        document, token, position = cursor.document, cursor.token, cursor.position
        room, n_documents = self._recipe.context_size, len(self._documents)
        dropped, window = self._recipe.drop_first_positions, self._recipe.window
        while room > 0 and document < n_documents:
            if self._held[0] != document:
                self._held = (document, self._documents[document])
            own = self._held[1]
            n_own = own.size if self._longest_own is None else min(own.size, self._longest_own)
            n_stream = n_own + self._tail.size if own.size else 0
            n_stream = n_stream if self._longest is None else min(n_stream, self._longest)
            if token < n_stream:
                prefix = (self._again if token else self._first)[:room]  # The last room may hold no other token.
                end = min(n_stream, token + room - prefix.size)
                length = prefix.size + end - token
                kept = (dropped, length)
                if window is not None:
                    kept = self._kept(position, length, n_stream - token, prefix.size)
                own_part, tail_part = (
                    own[token : min(end, n_own)],
                    self._tail[max(0, token - n_own) : max(0, end - n_own)],
                )
                pieces.append(_Piece(document, position, length, prefix, own_part, tail_part, *kept, own.size - n_own))
                room, token, position = room - length, end, position + length
            if token == n_stream:
                document, token, position = document + 1, 0, 0
            if pieces and self._alone:
                break
        return pieces, Cursor(document=document, token=token, position=position), room == 0

    def _kept(self, position: int, length: int, n_left: int, n_prefix: int) -> tuple[int, int]:
        """Returns the part of a piece that the window keeps: its first position and one past its last, from 0.

        The piece begins at `position` with `n_prefix` inserted tokens; `n_left` tokens of its document, the piece's
        included, are not yet in a sequence.
        """
        assert self._recipe.window
        n_again, n_behind = self._again.size, n_left - (length - n_prefix)
        # Every further piece inserts a prefix: the length of the whole stream depends on the number of pieces to come.
        n_more_pieces = -(-n_behind // (self._recipe.context_size - n_again))
        start, end = self._recipe.window.bounds(position + n_left + n_prefix + n_again * n_more_pieces)
        return max(start - position, self._recipe.drop_first_positions), min(end - position, length)

    def _batch(self, plan: _Plan) -> TokenBatch:
        # A piece's values are repeated over its tokens; everything is built flat and reshaped at the end.
        token_ids = np.concatenate([part for piece in plan.pieces for part in (piece.prefix, piece.own, piece.tail)])
        lengths = np.array([piece.length for piece in plan.pieces])
        slots = np.arange(token_ids.size)
        within = slots - np.repeat(np.cumsum(lengths) - lengths, lengths)
        documents = np.repeat(np.array([piece.document for piece in plan.pieces]), lengths)
        positions = within + np.repeat(np.array([piece.position for piece in plan.pieces]), lengths)
        width = token_ids.size // plan.n_sequences
        position_ids = slots % width if self._recipe.attend_across_documents else within
        keep = within >= self._recipe.drop_first_positions
        if self._recipe.window:
            keep &= within >= np.repeat(np.array([piece.kept_start for piece in plan.pieces]), lengths)
            keep &= within < np.repeat(np.array([piece.kept_end for piece in plan.pieces]), lengths)
        if self._recipe.drop_special_tokens:
            keep &= ~self._special[np.minimum(token_ids, self._special.size - 1)]
        shape = (plan.n_sequences, width)
        return TokenBatch(
            token_ids=token_ids.reshape(shape),
            position_ids=position_ids.astype(np.int32).reshape(shape),
            documents=documents.astype(np.int32).reshape(shape),
            positions=positions.astype(np.int32).reshape(shape),
            keep=keep.reshape(shape),
            start=plan.start,
            next=plan.next,
            n_cut_off=plan.n_cut_off,
        )


class _Piece(NamedTuple):
    """The part of a document in one sequence: a prefix if any, own tokens, and what ends the document."""

    document: int
    position: int
    length: int
    prefix: Int32Array
    own: Int32Array
    tail: Int32Array
    kept_start: int  # first position in the piece that becomes a row, from 0; at or beyond `kept_end`: none does
    kept_end: int
    n_cut_off: int  # of its document


class _Plan(NamedTuple):
    """A batch before its arrays are built; has no sequences if a window left out all of them."""

    start: Cursor
    next: Cursor
    n_sequences: int
    pieces: list[_Piece]
    n_cut_off: int
    n_documents_cut: int


class _Group:
    """Collects sequences for a batch."""

    def __init__(self, start: Cursor) -> None:
        self._start = self._next = start
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[_Piece] = []
        self._n_cut_off = self._n_documents_cut = 0
        self.n_sequences = 0
        self.n_left_out = 0  # tokens

    def add(self, sequence: list[_Piece], following: Cursor, *, needed: bool) -> None:
        """Adds a sequence, or only counts its tokens unless `needed`; `following` is the start of the next sequence."""
        self._next = following
        if needed:
            self._pieces += sequence
            self.n_sequences += 1
        else:
            self.n_left_out += sum(piece.length for piece in sequence)

    def count_cut_off(self, sequence: list[_Piece]) -> None:
        """Counts the tokens cut off the documents that end in the sequence added last."""
        for piece in sequence:
            if piece.n_cut_off and piece.document < self._next.document:
                self._n_cut_off += piece.n_cut_off
                self._n_documents_cut += 1

    def take(self) -> _Plan:
        """Returns the sequences added since the last call as a plan."""
        plan = _Plan(self._start, self._next, self.n_sequences, self._pieces, self._n_cut_off, self._n_documents_cut)
        self._start = self._next
        self._clear()
        return plan


def count_rows(documents: Documents, recipe: Recipe, special: SpecialTokens) -> tuple[int, int]:
    """Returns (rows, tokens through the model) of the whole corpus, exactly."""
    counts = Packer(documents, recipe, special).count()
    return counts.n_rows, counts.n_tokens


class _Around(NamedTuple):
    """The token ids that a recipe inserts: before a document, before its further pieces, and behind its own tokens."""

    first: tuple[int, ...]
    again: tuple[int, ...]
    suffix: tuple[int, ...]  # The part of the tail that stays when a document is truncated.
    tail: tuple[int, ...]

    @classmethod
    def of(cls, recipe: Recipe, special: SpecialTokens) -> _Around:
        """Returns the tokens that a recipe inserts around documents of a model."""
        by_tokenizer = recipe.bos == BY_TOKENIZER
        bos = () if special.bos_id is None or recipe.bos != "document" else (special.bos_id,)
        again = special.prefix if by_tokenizer else bos
        suffix = special.suffix if by_tokenizer and not special.written else ()
        wants_eos = recipe.eos == "document" and special.eos_id is not None
        # A tokenizer that ends its texts with the EOS token is not asked twice.
        eos = (special.eos_id,) if wants_eos and suffix[-1:] != (special.eos_id,) else ()
        return cls(() if by_tokenizer and special.written else again, again, suffix, (*suffix, *eos))


def check_special(recipe: Recipe, special: SpecialTokens) -> None:
    """Raises FieldInvalid if the recipe inserts an EOS token that the tokenizer lacks, or leaves no room for a text."""
    if recipe.eos == "document" and special.eos_id is None:
        raise FieldInvalid(
            "spec.recipe.eos is document, but the model's tokenizer has no EOS token; use none.",
            field="spec.recipe.eos",
        )
    around = _Around.of(recipe, special)
    n_inserted = len(around.again) + len(around.suffix)
    if recipe.context_size <= n_inserted:
        raise FieldInvalid(
            f"spec.recipe.context_size is {recipe.context_size}, and the model's tokenizer puts {n_inserted} tokens "
            f"around each text; use at least {n_inserted + 1}.",
            field="spec.recipe.context_size",
        )
