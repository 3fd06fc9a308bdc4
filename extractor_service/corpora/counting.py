"""How many rows a corpus gives, without a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from extractor_service.corpora.documents import TokenizedDocuments
from extractor_service.corpora.reader import DocumentReader
from extractor_service.corpora.tokenizer import Tokenizer
from extractor_service.estimate import RowCount
from extractor_service.packing import Documents, Int32Array, count_rows
from extractor_service.recipe import Recipe

# Tokenizing so much takes seconds; beyond it a sample has to do.
EXACT_BYTES = 16 * 1024 * 1024
SAMPLE_DOCUMENTS = 512


class _Sample:
    """Every n-th document."""

    def __init__(self, documents: Documents, indices: Sequence[int]) -> None:
        self._documents = documents
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Int32Array:
        return self._documents[self._indices[index]]


def count(corpus_path: Path, files_path: Path, recipe: Recipe) -> RowCount:
    """Counts rows and tokens; exactly for a small corpus, from a sample for a large one."""
    tokenizer = Tokenizer.load(files_path)
    with DocumentReader(corpus_path) as reader:
        sizes = [reader.size_bytes(index) for index in range(len(reader))] if len(reader) <= 10_000_000 else []
        documents = TokenizedDocuments(reader, tokenizer)
        if sizes and sum(sizes) <= EXACT_BYTES:
            n_rows, n_tokens = count_rows(documents, recipe, tokenizer.special)
            return RowCount(n_rows=n_rows, n_tokens=n_tokens, exact=True)
        step = max(len(reader) // SAMPLE_DOCUMENTS, 1)
        indices = range(0, len(reader), step)
        n_rows, n_tokens = count_rows(_Sample(documents, indices), recipe, tokenizer.special)
        scale = len(reader) / len(indices)
        return RowCount(n_rows=round(n_rows * scale), n_tokens=round(n_tokens * scale), exact=False)
