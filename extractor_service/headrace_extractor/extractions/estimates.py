"""Rows, bytes and seconds of an extraction before any work."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.ports import Confinement
from headrace_extractor.corpora.counting import RowCount, count
from headrace_extractor.extractions.ports import Corpora, Models
from headrace_extractor.sets.spec import ExtractionSpec

# A count tokenizes; more counts at once would only make each slower.
MAX_COUNTS = 2
# A count is a few numbers, but takes up to a minute to make.
MAX_REMEMBERED = 256


class RowCounter(Protocol):
    """Counts the rows of requests."""

    async def count(self, spec: ExtractionSpec) -> RowCount:
        """Rows and tokens of the corpus under the recipe, counted up to the rows that are asked for."""


class CorpusRowCounter:
    """Counts by tokenizing and packing the corpus, once for each corpus, tokenizer and recipe."""

    def __init__(self, corpora: Corpora, models: Models, confinement: Confinement = IN_PROCESS) -> None:
        self._corpora = corpora
        self._models = models
        # By digests as well as by paths: a corpus may be deleted and another one take its id, a tokenizer replaced.
        self._count = lru_cache(maxsize=MAX_REMEMBERED)(
            lambda _digests, path, files_path, recipe, max_rows: count(path, files_path, recipe, max_rows, confinement)
        )
        # Threads of their own: the default threads, which heartbeats need too, must not be busy for a minute.
        self._threads = ThreadPoolExecutor(MAX_COUNTS, thread_name_prefix="counts")

    async def count(self, spec: ExtractionSpec) -> RowCount:
        """Implements RowCounter."""
        model = await self._models.get_model(spec.model_id)
        path, digest = self._corpora.path(spec.corpus_id), self._corpora.get(spec.corpus_id).digest
        # The commit tells of another chat template, too.
        digests = (digest, model.tokenizer_digest, model.commit_sha)
        what = (digests, path, Path(model.files_path), spec.recipe, spec.max_rows)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._count, *what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Rows, bytes and seconds of an extraction; negative: unknown.

    `size_bytes`: bytes of all its rows; `new_bytes`: bytes that it would add to the disk; `available_bytes`: bytes that
    the disk could take.
    """

    n_rows: int
    n_tokens: int
    n_rows_cached: int
    size_bytes: int
    seconds: float
    new_bytes: int = -1
    available_bytes: int = -1


def estimate(count: RowCount, *, max_rows: int, n_rows_cached: int, row_bytes: int, rows_per_s: float) -> Estimate:
    """Combines a count of rows with the rate last seen; `rows_per_s` is 0 while unknown."""
    n_rows = min(count.n_rows, max_rows) if max_rows else count.n_rows
    to_compute = max(n_rows - n_rows_cached, 0)
    return Estimate(
        n_rows=n_rows,
        n_tokens=count.n_tokens,
        n_rows_cached=n_rows_cached,
        size_bytes=n_rows * row_bytes,
        seconds=to_compute / rows_per_s if rows_per_s else (-1.0 if to_compute else 0.0),
    )
