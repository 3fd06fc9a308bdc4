"""Mixes corpora into a new one.

Each document comes from a corpus drawn by weight, and each corpus gives its documents in order. The mixture ends when a
corpus is drawn that has no document left: up to there every corpus has its share, as far as chance goes. The random
numbers are those of `random.Random(seed).random()`, which Python keeps the same over its versions.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.errors import FieldInvalid

MAX_PARTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class MixPart:
    """One corpus and its share of the documents, relative to the sum of all weights."""

    corpus_id: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A checked mixture; raises FieldInvalid naming `mix.<field>`. `max_documents` 0: until a corpus is exhausted."""

    parts: tuple[MixPart, ...]
    seed: int = 0
    max_documents: int = 0

    def __post_init__(self) -> None:
        ids = [part.corpus_id for part in self.parts]
        if not 2 <= len(ids) <= MAX_PARTS:
            raise FieldInvalid(f"mix.parts must name 2 to {MAX_PARTS} corpora, not {len(ids)}.", field="mix.parts")
        if len(set(ids)) != len(ids):
            raise FieldInvalid("mix.parts names a corpus twice; give it the sum of its weights.", field="mix.parts")
        if not all(part.weight > 0 and math.isfinite(part.weight) for part in self.parts):
            raise FieldInvalid("A weight in mix.parts is not a number above 0.", field="mix.parts")
        if not math.isfinite(sum(part.weight for part in self.parts)):
            raise FieldInvalid("The weights in mix.parts are too large to be added.", field="mix.parts")
        if self.max_documents < 0:
            raise FieldInvalid("mix.max_documents is negative; 0 means no limit.", field="mix.max_documents")

    @property
    def origin(self) -> str:
        """Describes the mixture for people."""
        parts = " ".join(f"{part.corpus_id}:{part.weight:g}" for part in self.parts)
        return f"mix:{parts} seed {self.seed}"


def check_kinds(readers: Sequence[DocumentReader]) -> None:
    """Raises FieldInvalid unless all corpora hold documents of one kind."""
    first = readers[0]
    for reader in readers:
        if reader.kind != first.kind:
            raise FieldInvalid(
                f"Corpus {first.corpus.id} holds {first.kind} and {reader.corpus.id} holds {reader.kind}; mix corpora"
                " of one kind.",
                field="mix.parts",
                metadata={"corpus": reader.corpus.id},
            )


def draw(mix: Mix, readers: Sequence[DocumentReader]) -> Iterator[bytes]:
    """Yields the documents of the mixture as the bytes that the corpora store."""
    bounds = list(itertools.accumulate(part.weight for part in mix.parts))
    numbers = random.Random(mix.seed)  # noqa: S311 -- nothing secret
    taken = [0] * len(readers)
    for n_drawn in itertools.count():
        if mix.max_documents and n_drawn == mix.max_documents:
            return
        # Rounding may lift the product to the last bound itself, which belongs to no corpus.
        drawn = min(bisect_right(bounds, numbers.random() * bounds[-1]), len(readers) - 1)
        if taken[drawn] == len(readers[drawn]):
            return
        yield readers[drawn].content(taken[drawn])
        taken[drawn] += 1
