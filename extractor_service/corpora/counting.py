"""How many rows a corpus gives, without a forward pass."""

from __future__ import annotations

import time
from pathlib import Path

from extractor_service.corpora.documents import TokenizedDocuments
from extractor_service.corpora.reader import DocumentReader
from extractor_service.corpora.tokenizer import Tokenizer
from extractor_service.estimate import RowCount
from extractor_service.packing import Packer
from extractor_service.recipe import Recipe

# Longer, and the rows of the leading documents stand for the rest.
EXACT_WITHIN_S = 20.0


def count(corpus_path: Path, files_path: Path, recipe: Recipe) -> RowCount:
    """Counts rows and tokens; exactly if that takes no longer than `EXACT_WITHIN_S`, else by extrapolation."""
    deadline = time.monotonic() + EXACT_WITHIN_S
    with DocumentReader(corpus_path) as reader:
        tokenizer = Tokenizer.load(files_path, ids_only=reader.tokenized)
        packer = Packer(TokenizedDocuments(reader, tokenizer), recipe, tokenizer.special)
        counts = packer.count(stop=lambda: time.monotonic() > deadline)
        counted_bytes = sum(reader.size_bytes(index) for index in range(counts.n_documents))
        exact = counts.n_documents >= len(reader)
        scale = 1.0 if exact or not counted_bytes else reader.corpus.size_bytes / counted_bytes
    return RowCount(n_rows=round(counts.n_rows * scale), n_tokens=round(counts.n_tokens * scale), exact=exact)
