"""Counts the rows that a corpus gives under a recipe, without a forward pass.

`python -m headrace_extractor.corpora.counting` counts in a process of its own: a line of JSON in, one out. Chat
templates are programs from model repos, and a template that does not end must not keep a thread of the server busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora.documents import open_documents
from headrace_extractor.corpora.packing import Packer
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import WaitTimeout, error_for, reason_of

# After this time the rows of the documents counted so far stand for the rest.
EXACT_WITHIN_S = 20.0
# The rest is for starting a process, and for a block of documents that has begun by then.
CHILD_DEADLINE_S = EXACT_WITHIN_S + 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCount:
    """Rows of a corpus under a recipe and the tokens of their forward passes; extrapolated unless `exact`."""

    n_rows: int
    n_tokens: int
    exact: bool


def count(corpus_path: Path, files_path: Path, recipe: Recipe, max_rows: int = 0) -> RowCount:
    """Counts rows and tokens; exactly if that takes no longer than `EXACT_WITHIN_S`, else by extrapolation.

    Stops at the end of the batch that reaches `max_rows`; 0: at the end of the corpus. Raises the errors of the
    recipe, the corpus and the tokenizer, and WaitTimeout for a chat template that takes too long.
    """
    if not recipe.chat_template:
        return _count(corpus_path, files_path, recipe, max_rows)
    job = {
        "corpus_path": str(corpus_path),
        "files_path": str(files_path),
        "recipe": recipe.to_json(),
        "max_rows": max_rows,
    }
    command = [sys.executable, "-m", "headrace_extractor.corpora.counting"]
    try:
        done = subprocess.run(  # noqa: S603 -- our own module
            command, input=json.dumps(job).encode(), capture_output=True, timeout=CHILD_DEADLINE_S, check=True
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as exc:
        raise WaitTimeout("Counting rows with the model's chat template took too long; does the template end?") from exc
    if "reason" in answer:
        error = error_for(answer["reason"], answer["message"], metadata=answer["metadata"])
        error.field = answer["field"]
        raise error
    return RowCount(**answer)


def _count(corpus_path: Path, files_path: Path, recipe: Recipe, max_rows: int) -> RowCount:
    deadline = time.monotonic() + EXACT_WITHIN_S
    with DocumentReader(corpus_path) as reader:
        documents, special = open_documents(reader, files_path, recipe)
        packer = Packer(documents, recipe, special)
        counts = packer.count(max_rows=max_rows, stop=lambda: time.monotonic() > deadline)
        counted_bytes = sum(reader.size_bytes(index) for index in range(counts.n_documents))
        exact = counts.n_documents >= len(reader) or 0 < max_rows <= counts.n_rows
        scale = 1.0 if exact or not counted_bytes else reader.corpus.size_bytes / counted_bytes
    return RowCount(n_rows=round(counts.n_rows * scale), n_tokens=round(counts.n_tokens * scale), exact=exact)


def main() -> None:
    """Reads a job from standard input; writes its counts, or the error, to standard output."""
    job = json.loads(sys.stdin.buffer.read())
    try:
        recipe = Recipe.from_json(job["recipe"])
        answer = asdict(_count(Path(job["corpus_path"]), Path(job["files_path"]), recipe, job["max_rows"]))
    except ServiceError as exc:
        metadata = dict(exc.metadata)
        answer = {"reason": reason_of(exc), "message": exc.message, "metadata": metadata, "field": exc.field}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
