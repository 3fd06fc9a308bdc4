"""The extraction loop: documents in, rows in the log, until the corpus or the granted rows end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from headrace_extractor.corpora.documents import open_documents
from headrace_extractor.corpora.packing import Cursor, Packer, TokenBatch
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import PACKED, Recipe
from headrace_extractor.errors import CorpusEmpty, DigestMismatch, FieldInvalid
from headrace_extractor.node.runner_protocol import Blocked, Committed, Extract, Finished, Message
from headrace_extractor.runner.gate import Gate
from headrace_extractor.runner.hooks.binding import anatomy_of, resolve
from headrace_extractor.runner.hooks.capture import Site
from headrace_extractor.runner.models.loading import LoadedModel, out_of_memory_as_typed
from headrace_extractor.runner.passes.forward import BatchRows, fetch_for, forward_rows
from headrace_extractor.runner.passes.parity import Parity, ParityCheck
from headrace_extractor.runner.passes.rows import TORCH_DTYPES, RowSource
from headrace_extractor.runner.passes.statistics import summarize
from headrace_extractor.runner.throttle import Throttle
from headrace_log.errors import DiskFull
from headrace_log.layout import ColumnSpec
from headrace_log.manifest import Manifest
from headrace_log.writer import SetWriter

Emit = Callable[[Message], None]

# Often enough for smooth progress and prompt readers; every event wakes the server.
_COMMITTED_PER_SECOND = 20


def run_extraction(command: Extract, gate: Gate, loaded: LoadedModel, emit: Emit) -> None:
    """Carries out one `extract` command; emits `committed`, `blocked` and at last `finished`.

    Whatever ends it, rows that were committed are sealed first. Raises ServiceError and LogError.
    """
    manifest = Manifest.load(Path(command.set_path))
    recipe = Recipe.from_json(manifest.identity["recipe"])
    written = command.columns or [column.name for column in manifest.columns]
    columns = [column for column in manifest.hookpoints if column.name in written]
    sites = resolve(loaded.model, [column.name for column in columns])
    _check_context(recipe, loaded)
    with DocumentReader(Path(command.corpus_path)) as reader:
        _check_corpus(reader.digest, manifest)
        documents, special = open_documents(reader, loaded.files_path, recipe)
        packer = Packer(documents, recipe, special)
        with SetWriter.open(Path(command.set_path), written, summarize) as writer:
            job = _Job(
                command=command,
                gate=gate,
                writer=writer,
                loaded=loaded,
                columns=columns,
                sites=sites,
                packer=packer,
                emit=emit,
                parity=_parity_check(loaded, command, manifest, columns, sites),
                n_non_finite=writer.n_non_finite,
                trims=recipe.window is not None and _looks_back_only(loaded.model, recipe.context_size),
            )
            complete = manifest.total_rows == writer.next_row or job.run()
    emit(
        Finished(
            set_id=command.set_id,
            n_rows=writer.next_row,
            complete=complete,
            n_non_finite=job.n_non_finite,
        )
    )


@dataclass(slots=True, kw_only=True)
class _Job:
    command: Extract
    gate: Gate
    writer: SetWriter
    loaded: LoadedModel
    columns: Sequence[ColumnSpec]
    sites: Sequence[Site]
    packer: Packer
    emit: Emit
    parity: ParityCheck
    trims: bool
    n_tokens: int = 0
    n_non_finite: int = 0
    throttle: Throttle = field(default_factory=lambda: Throttle(_COMMITTED_PER_SECOND))

    def run(self) -> bool:
        """Writes rows to the end; returns whether the corpus is exhausted."""
        try:
            exhausted = self._write_all()
        finally:
            self._tell_committed()
            self.writer.seal()
        if exhausted and self.writer.next_row == 0:
            raise CorpusEmpty("No row survives the recipe: every document is empty, or all its tokens are dropped.")
        if exhausted:
            self.writer.finish()
        return exhausted

    def _write_all(self) -> bool:
        start, skip_rows = _resume_point(self.writer.resume)
        fetch = fetch_for(self.loaded.device, {column.name: TORCH_DTYPES[column.dtype] for column in self.columns})
        with out_of_memory_as_typed(
            self.loaded.device, self.loaded.measured_bytes, "Use a smaller batch_size or context_size."
        ):
            for rows in fetch.rows(self._passes(start)):
                if not self._write_batch(rows, skip_rows):
                    return False
                skip_rows = 0
        return not self._is_over()

    def _passes(self, start: Cursor) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
        for batch in self.packer.batches(start, stop=self._is_over):
            if self._is_over():
                return
            needed = batch.trimmed() if self.trims else batch
            self.n_tokens += needed.token_ids.size
            yield needed, forward_rows(self.loaded.model, needed, self.sites)

    def _write_batch(self, rows: BatchRows, done: int) -> bool:
        """Writes a batch's rows from `done` on; returns False if stopped or if `max_rows` exist."""
        source = RowSource(rows, self.columns, allow_non_finite=self.command.allow_non_finite)
        wanted = self.command.max_rows - self.writer.next_row if self.command.max_rows else source.n_rows
        self.parity.begin(rows.batch, done, done + wanted)
        while done < source.n_rows:
            n_rows = min(source.n_rows - done, self._room())
            if n_rows == 0:
                self.parity.end()
                return False
            reservation = self.writer.reserve(n_rows)
            non_finite = source.copy_to(reservation, done)
            self.n_non_finite += sum(non_finite.values())
            self.parity.stored(reservation, done)
            done += reservation.n_rows
            self.writer.commit(reservation.n_rows, _resume_json(rows.batch, done, source.n_rows), non_finite)
        self.parity.end()
        if self.throttle.ready():
            self._tell_committed()
        return True

    def _room(self) -> int:
        """Rows that may be written now; waits for a grant. 0 when it is over."""
        row = self.writer.next_row
        if self._is_over():
            return 0
        granted = self.gate.rows_from(row, self._tell_blocked)
        return min(granted, self.command.max_rows - row) if self.command.max_rows else granted

    def _is_over(self) -> bool:
        return self.gate.stopped or bool(self.command.max_rows and self.writer.next_row >= self.command.max_rows)

    def _tell_committed(self) -> None:
        self.emit(
            Committed(
                set_id=self.command.set_id,
                n_rows=self.writer.next_row,
                n_tokens=self.n_tokens,
                n_non_finite=self.n_non_finite,
            )
        )

    def _tell_blocked(self) -> None:
        self.writer.settle()  # Rows go when their segment is sealed: if that has failed, nobody could ever grant more.
        self._tell_committed()
        self.emit(Blocked(set_id=self.command.set_id, n_rows=self.writer.next_row))


def _parity_check(
    loaded: LoadedModel, command: Extract, manifest: Manifest, columns: Sequence[ColumnSpec], sites: Sequence[Site]
) -> ParityCheck:
    """Compares the columns that no earlier run has."""
    new = [column for column in columns if column.name not in manifest.receipt]
    names = {column.name for column in new}

    def save(receipt: Mapping[str, Parity]) -> None:
        entries = {name: parity.to_json() for name, parity in receipt.items()}
        with suppress(DiskFull):  # Rows may still fit, and the next run compares again.
            # Another process may have added columns to the manifest since.
            Manifest.update(Path(command.set_path), lambda known: replace(known, receipt={**known.receipt, **entries}))

    return ParityCheck(loaded.model, new, [site for site in sites if site.name in names], save)


def _looks_back_only(model: PreTrainedModel, context_size: int) -> bool:
    """True when no row depends on tokens behind it, in sequences of this length."""
    anatomy = anatomy_of(model)
    return anatomy.causal and all(context_size <= limit for limit in anatomy.rotation_limits)


def _check_context(recipe: Recipe, loaded: LoadedModel) -> None:
    """Beyond its positions a model has no embedding, or rotates by angles that depend on what it saw before."""
    limit = loaded.n_positions
    if limit is not None and recipe.context_size > limit:
        raise FieldInvalid(
            f"context_size is {recipe.context_size}, and the model has {limit} positions; use at most that.",
            field="spec.recipe.context_size",
            metadata={"max_position_embeddings": str(limit)},
        )
    _check_rotation(recipe, anatomy_of(loaded.model).rotation_limits)


def _check_rotation(recipe: Recipe, limits: Sequence[int]) -> None:
    """One document alone, or sequences that are each one text, are rotated as they would be by themselves."""
    if recipe.packing != PACKED or recipe.attend_across_documents:
        return
    limit = min(limits, default=recipe.context_size)
    if recipe.context_size > limit:
        raise FieldInvalid(
            f"context_size is {recipe.context_size}, and a document of more than {limit} tokens changes how this model "
            f"rotates all others in its batch; use packing one_document, or a context_size of at most {limit}.",
            field="spec.recipe.context_size",
            metadata={"original_max_position_embeddings": str(limit)},
        )


def _check_corpus(digest: str, manifest: Manifest) -> None:
    """Raises DigestMismatch for a corpus that is not the one whose rows the set holds."""
    if digest != manifest.identity.get("corpus_digest", digest):
        raise DigestMismatch(
            "The corpus is not the one this set was begun with; start the extraction again: its rows will be another "
            "set's."
        )


def _resume_point(resume: Mapping[str, Any] | None) -> tuple[Cursor, int]:
    """Batch to start from, and how many of its rows are there already."""
    if resume is None:
        return Cursor(), 0
    cursor = dict(resume)
    skip_rows = cursor.pop("skip_rows")
    return Cursor.from_json(cursor), skip_rows


def _resume_json(batch: TokenBatch, done: int, n_rows: int) -> dict[str, int]:
    if done == n_rows:
        return {**batch.next.to_json(), "skip_rows": 0}
    return {**batch.start.to_json(), "skip_rows": done}
