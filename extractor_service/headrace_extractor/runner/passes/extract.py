"""The extraction loop: documents in, rows in the log, until the corpus or the granted rows end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace_chassis.confined.pool import Confined
from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora.chat_template import ChatTemplate
from headrace_extractor.corpora.documents import TokenizedDocuments, open_documents
from headrace_extractor.corpora.packing import Cursor, Packer, TokenBatch
from headrace_extractor.corpora.reader import DocumentReader
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.errors import CorpusEmpty, DigestMismatch, ModelChanged
from headrace_extractor.node.runner_protocol import N_SKIPPED, Blocked, Committed, Extract, Finished, Message
from headrace_extractor.runner.gate import Gate
from headrace_extractor.runner.hooks.binding import anatomy_of, bind
from headrace_extractor.runner.hooks.capture import Site
from headrace_extractor.runner.models.loading import LoadedModel, out_of_memory_as_typed
from headrace_extractor.runner.passes.context import check_context
from headrace_extractor.runner.passes.forward import BatchRows, fetch_for, forward_rows
from headrace_extractor.runner.passes.known_rows import KnownRows
from headrace_extractor.runner.passes.own_tokens import OwnTokens
from headrace_extractor.runner.passes.parity import Parity, ParityCheck
from headrace_extractor.runner.passes.rows import TORCH_DTYPES, RowSource
from headrace_extractor.runner.passes.statistics import summarize
from headrace_extractor.runner.throttle import Throttle
from headrace_log.errors import DiskFull
from headrace_log.layout import ColumnSpec
from headrace_log.manifest import Manifest
from headrace_log.writer import SetWriter
from headrace_models.folder import TOKENIZER, sha256_of

Emit = Callable[[Message], None]

# Smooth progress and prompt readers need no more, and every event wakes the server.
_COMMITTED_PER_SECOND = 20
_ADVICE = "Use a smaller batch_size or context_size."


def run_extraction(
    command: Extract, gate: Gate, loaded: LoadedModel, emit: Emit, *, verified: set[tuple[int, ...]] | None = None
) -> None:
    """Carries out one `extract` command; emits `committed`, `blocked` and at last `finished`.

    `verified` are stamps of corpora that were compared with their digests; the stamp of this one is added.

    Committed rows are sealed first, also if an error ends the run. Raises ServiceError and LogError.
    """
    loaded.check_files()
    manifest = Manifest.load(Path(command.set_path))
    recipe = Recipe.from_json(manifest.identity["recipe"])
    written = command.columns or [column.name for column in manifest.columns]
    columns = [column for column in manifest.hookpoints if column.name in written]
    sites = bind(loaded.model, [column.name for column in columns])
    with out_of_memory_as_typed(loaded.device, loaded.measured_bytes, _ADVICE):
        check_context(recipe, loaded)
    anatomy = anatomy_of(loaded.model)
    # No row depends on later tokens: then passes can end with the last row of a window.
    looks_back_only = anatomy.causal and all(recipe.context_size <= limit for limit in anatomy.rotation_limits)
    # Chat templates are programs from model repos, which this process and its device memory must outlive.
    confined = Confined(errors=ServiceError, preload=("headrace_extractor.corpora.chat",), at_once=1)
    with DocumentReader(Path(command.corpus_path)) as reader, closing(confined):
        if reader.digest != manifest.identity.get("corpus_digest", reader.digest):
            raise DigestMismatch(
                "The corpus is not the one this set was begun with; start the extraction again: its rows will be "
                "another set's."
            )
        _check_tokenizer(manifest.identity, loaded.files_path, recipe)
        verified = set() if verified is None else verified
        if reader.stamp not in verified:
            stamp = reader.stamp  # Before: a file that is written to meanwhile has another one by then.
            reader.verify(lambda: gate.stopped)
            if not gate.stopped:
                verified.add(stamp)
        documents, special = open_documents(reader, loaded.files_path, recipe, confined)
        with SetWriter.open(Path(command.set_path), written, summarize) as writer:
            run = _Run(
                command=command,
                gate=gate,
                writer=writer,
                known_rows=KnownRows(Path(command.set_path), written),
                loaded=loaded,
                columns=columns,
                sites=sites,
                packer=Packer(documents, recipe, special),
                emit=emit,
                parity=_parity_check(
                    loaded,
                    Path(command.set_path),
                    # Other columns have a receipt from an earlier run.
                    [column for column in columns if column.name not in manifest.receipt],
                    sites,
                    OwnTokens(loaded.files_path, documents, recipe, special),
                ),
                n_non_finite=writer.n_non_finite,
                documents=documents,
                n_skipped_before=(writer.resume or {}).get(N_SKIPPED, 0),
                trims=recipe.window is not None and looks_back_only,
            )
            complete = manifest.total_rows == writer.next_row or run.to_the_end()
    emit(
        Finished(
            set_id=command.set_id,
            n_rows=writer.next_row,
            complete=complete,
            n_non_finite=run.n_non_finite,
            n_skipped=run.n_skipped,
        )
    )


@dataclass(slots=True, kw_only=True)
class _Run:
    """One run over a set: everything it needs, and its counts so far."""

    command: Extract
    gate: Gate
    writer: SetWriter
    known_rows: KnownRows
    loaded: LoadedModel
    columns: Sequence[ColumnSpec]
    sites: Sequence[Site]
    packer: Packer
    emit: Emit
    parity: ParityCheck
    trims: bool
    n_tokens: int = 0
    n_non_finite: int = 0
    documents: TokenizedDocuments
    n_skipped_before: int = 0  # In earlier runs.
    throttle: Throttle = field(default_factory=lambda: Throttle(_COMMITTED_PER_SECOND))

    def to_the_end(self) -> bool:
        """Writes rows until the corpus ends, `max_rows` exist, or a stop; returns whether the corpus is exhausted."""
        resume = dict(self.writer.resume or {})
        done = resume.pop("skip_rows", 0)  # Rows of the first batch that exist already.
        resume.pop(N_SKIPPED, None)
        fetch = fetch_for(self.loaded.device, {column.name: TORCH_DTYPES[column.dtype] for column in self.columns})
        try:
            with out_of_memory_as_typed(self.loaded.device, self.loaded.measured_bytes, _ADVICE):
                for rows in fetch.rows(self._forwards(Cursor.from_json(resume))):
                    # Weights are mapped: what is written to their files is computed with.
                    if self.loaded.device.type == "cpu":
                        self.loaded.check_files()
                    if not self._write_batch(rows, done):
                        break
                    done = 0
            exhausted = not self._is_over()
        finally:
            self._tell_committed()
            self.writer.seal()
        if exhausted and self.writer.next_row == 0:
            raise CorpusEmpty("No row survives the recipe: every document is empty, or all its tokens are dropped.")
        if exhausted:
            self.writer.finish()
        return exhausted

    def _forwards(self, start: Cursor) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
        """Yields each batch with its activations; a pass begins when the next item is asked for."""
        for batch in self.packer.batches(start, stop=self._is_over):
            if self._is_over():
                return
            needed = batch.trimmed() if self.trims else batch
            self.n_tokens += needed.token_ids.size
            yield needed, forward_rows(self.loaded.model, needed, self.sites)

    def _write_batch(self, rows: BatchRows, done: int) -> bool:
        """Writes a batch's rows from `done` on; returns False if stopped or if `max_rows` exist."""
        source = RowSource(rows, self.columns, allow_non_finite=self.command.allow_non_finite)
        max_rows = self.command.max_rows or sys.maxsize
        self.parity.begin(rows.batch, done, done + max_rows - self.writer.next_row)
        while done < source.n_rows:
            next_row = self.writer.next_row
            n_rows = 0
            if not self._is_over():
                granted_rows = self.gate.rows_from(next_row, self._tell_blocked)
                n_rows = min(source.n_rows - done, granted_rows, max_rows - next_row)
            if n_rows == 0:
                self.parity.end()
                return False
            reservation = self.writer.reserve(n_rows)
            self.known_rows.check(next_row, source.origins(done, reservation.n_rows))
            non_finite = source.copy_to(reservation, done)
            self.n_non_finite += sum(non_finite.values())
            self.parity.stored(reservation, done)
            done += reservation.n_rows
            # Where the next run begins: at the next batch, or in this batch again behind the rows done.
            cursor, skip_rows = (rows.batch.next, 0) if done == source.n_rows else (rows.batch.start, done)
            resume = {**cursor.to_json(), "skip_rows": skip_rows}
            if n_skipped := self.n_skipped_before + self.documents.n_skipped_before(cursor.document):
                resume[N_SKIPPED] = n_skipped
            self.writer.commit(reservation.n_rows, resume, non_finite)
        self.parity.end()
        if self.throttle.ready():
            self._tell_committed()
        return True

    @property
    def n_skipped(self) -> int:
        """Documents skipped so far, those of earlier runs counted."""
        return self.n_skipped_before + self.documents.n_skipped_before(sys.maxsize)

    def _is_over(self) -> bool:
        return self.gate.stopped or bool(self.command.max_rows and self.writer.next_row >= self.command.max_rows)

    def _tell_committed(self) -> None:
        self.emit(
            Committed(
                set_id=self.command.set_id,
                n_rows=self.writer.next_row,
                n_tokens=self.n_tokens,
                n_non_finite=self.n_non_finite,
                n_skipped=self.n_skipped,
            )
        )

    def _tell_blocked(self) -> None:
        # Rows are released by whole sealed segments. After a sealing that failed no grant could ever come: fail now.
        self.writer.settle()
        self._tell_committed()
        self.emit(Blocked(set_id=self.command.set_id, n_rows=self.writer.next_row))


def _parity_check(
    loaded: LoadedModel, set_path: Path, columns: Sequence[ColumnSpec], sites: Sequence[Site], own_tokens: OwnTokens
) -> ParityCheck:
    """Returns the check of these columns, which keeps its receipt in the set's manifest."""
    names = {column.name for column in columns}

    def save(receipt: Mapping[str, Parity]) -> None:
        entries = {name: parity.to_json() for name, parity in receipt.items()}
        with suppress(DiskFull):  # Rows may still fit, and the next run compares again.
            # Another process may have added columns to the manifest since.
            Manifest.update(set_path, lambda known: replace(known, receipt={**known.receipt, **entries}))

    return ParityCheck(loaded.model, columns, [site for site in sites if site.name in names], own_tokens, save)


def _check_tokenizer(identity: Mapping[str, Any], files_path: Path, recipe: Recipe) -> None:
    """Raises ModelChanged unless tokenizer and chat template are those that the set was begun with."""
    tokenizer = files_path / TOKENIZER
    now = {"tokenizer_digest": sha256_of(tokenizer) if tokenizer.is_file() else ""}
    if recipe.chat_template:
        now["chat_template_digest"] = ChatTemplate.load(files_path).digest
    changed = [name.removesuffix("_digest") for name, digest in now.items() if identity.get(name, digest) != digest]
    if changed:
        raise ModelChanged(
            f"The {' and '.join(changed)} of the model in {files_path} is not what this set was begun with. Prepare "
            "the model again, then start the extraction again: its rows will be another set's.",
            metadata={"changed": ", ".join(changed)},
        )
