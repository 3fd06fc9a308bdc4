"""Counts the rows that a corpus gives under a recipe, without a forward pass.

Tokenizers and chat templates are files from outside, so counting runs under confinement: neither the memory nor the
interpreter of a server is theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement
from headrace_extractor.corpora.documents import open_documents
from headrace_extractor.corpora.packing import Counts, Packer
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import ModelUnsupported

# After this time the rows of the documents counted so far stand for the rest.
EXACT_WITHIN_S = 20.0
# The limits of time begin anew so often, so that they are those of one document: a tokenizer works on it in one thread,
# and takes a second for some megabytes.
_PAUSE_S = 1.0
# The tokenizers of the largest vocabularies take half a gigabyte while they are parsed, and each thread 500 bytes a
# token while it works.
_LIMITS = Limits(memory_bytes=3 * 1024**3, cpu_s=40 + (os.cpu_count() or 1), wall_s=160.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCount:
    """Rows of a corpus under a recipe and the tokens of their forward passes; extrapolated unless `exact`."""

    n_rows: int
    n_tokens: int
    exact: bool


def count(
    corpus_path: Path, files_path: Path, recipe: Recipe, max_rows: int = 0, confinement: Confinement = IN_PROCESS
) -> RowCount:
    """Counts rows and tokens; exactly if that takes no longer than `EXACT_WITHIN_S`, else by extrapolation.

    Stops at the end of the batch that reaches `max_rows`; 0: at the end of the corpus. Raises the errors of the
    recipe, the corpus and the tokenizer, ModelUnsupported for a tokenizer or chat template beyond its limits, and
    ParsersBusy for a count that was lost by accident.
    """
    job = {
        "corpus_path": str(corpus_path),
        "files_path": str(files_path),
        "recipe": recipe.to_json(),
        "max_rows": max_rows,
    }
    return RowCount(**confinement.run(told_count, job, refuse=_beyond_limits, limits=_LIMITS))


def told_count(
    *, corpus_path: str, files_path: str, recipe: dict[str, Any], max_rows: int
) -> Generator[None, None, dict[str, Any]]:
    """Returns a RowCount as JSON; yields now and then, so that limits of time begin anew."""
    paused = time.monotonic()
    deadline = paused + EXACT_WITHIN_S

    def pause_is_due() -> bool:
        return time.monotonic() > paused + _PAUSE_S

    checked = Recipe.from_json(recipe)
    with DocumentReader(corpus_path) as reader:
        documents, special = open_documents(reader, files_path, checked)
        packer = Packer(documents, checked, special)
        counts = Counts()
        for counts in packer.counts(max_rows=max_rows, pause=pause_is_due):  # noqa: B007 -- the last ones count
            if time.monotonic() > deadline:
                break
            if pause_is_due():
                yield
                paused = time.monotonic()
        counted_bytes = sum(reader.size_bytes(index) for index in range(counts.n_documents))
        exact = counts.n_documents >= len(documents) or 0 < max_rows <= counts.n_rows
        share = len(documents) / len(reader)  # Of the corpus, if the recipe takes its first documents only.
        scale = 1.0 if exact or not counted_bytes else max(1.0, share * reader.corpus.size_bytes / counted_bytes)
    n_rows, n_tokens = round(counts.n_rows * scale), round(counts.n_tokens * scale)
    return {"n_rows": n_rows, "n_tokens": n_tokens, "exact": exact}


def _beyond_limits(why: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"The tokenizer or chat template of the model {why}; take these files from the model's own repo, or use a"
        " corpus of token ids."
    )
