"""Compares every sealed file of a set with its digest, at a person's wish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace

from headrace_extractor.errors import DigestMismatch
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_log.index import FILE_NAME as INDEX_NAME
from headrace_log.index import SegmentRecord
from headrace_log.layout import ColumnSpec, segment_path

TELL_EVERY_S = 0.5
# A message stays below gRPC's limit, and nobody reads more lines.
MAX_DAMAGES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file that is not as it was sealed, and the rows that are lost with it; no column: a line of the index."""

    file: str
    column: str
    first_row: int
    end_row: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """How far a verification is; `damages` are the first thousand."""

    n_files: int = 0
    n_files_total: int = 0
    size_bytes: int = 0
    total_bytes: int = 0
    n_damaged: int = 0
    damages: tuple[Damage, ...] = ()
    done: bool = False


class Verification:
    """One pass over the files of a set, which stays on disk meanwhile."""

    holds_set = holds_set_itself = True
    reader_names = ()
    id = "verification"

    def __init__(self, of: ActivationSet, *, n_at_once: int) -> None:
        self._of = of
        self._n_at_once = n_at_once
        self._so_far = Verified()

    async def progress(self) -> AsyncGenerator[Verified, None]:
        """Yields how far it is, twice a second and at the end. Damaged segments are missing from the set afterwards."""
        self._of.users.append(self)
        try:
            files = self._files()
            workers = [asyncio.create_task(self._work(files)) for _ in range(self._n_at_once)]
            try:
                while True:
                    yield self._so_far
                    _, pending = await asyncio.wait(workers, timeout=TELL_EVERY_S)
                    if not pending:
                        break
                for worker in workers:
                    worker.result()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            yield replace(self._so_far, done=True)
        finally:
            self._of.users.remove(self)

    def _files(self) -> Iterator[tuple[SegmentRecord, ColumnSpec]]:
        """Counts the files; returns them, to be shared by the workers."""
        integrity, manifest = self._of.integrity, self._of.manifest()
        n_mended = integrity.n_mended
        index, kept = self._of.index(), self._of.first_kept_row()
        if integrity.n_mended > n_mended or integrity.is_index_damaged:
            n_rows = index.records[-1].end_row if index.records else 0
            message = f"A line of {INDEX_NAME} is no record; the rows behind it are computed by the next extraction."
            self._note(Damage(file=INDEX_NAME, column="", first_row=n_rows, end_row=0, message=message))
        for segment, name in integrity.damaged():  # Found while the set was written; the index leaves them out.
            if index.n_before(kept) <= segment < len(index.records):
                path, rows = segment_path(self._of.folder, manifest.column(name), segment), index.records[segment]
                message = f"{path} was found damaged; the next extraction computes its rows anew."
                damage = Damage(
                    file=str(path), column=name, first_row=rows.first_row, end_row=rows.end_row, message=message
                )
                self._note(damage)
        files = [
            (record, column)
            for record in index.records[index.n_before(kept) :]
            for column in manifest.columns
            if column.name in record.digests
        ]
        total_bytes = sum(record.n_rows * column.row_bytes for record, column in files)
        self._so_far = replace(self._so_far, n_files_total=len(files), total_bytes=total_bytes)
        return iter(files)

    async def _work(self, files: Iterator[tuple[SegmentRecord, ColumnSpec]]) -> None:
        for record, column in files:
            try:
                await self._of.check_segment(record, (column,))
            except DigestMismatch as exc:
                facts = exc.metadata
                self._note(
                    Damage(
                        file=facts.get("file", ""),
                        column=column.name,
                        first_row=record.first_row,
                        end_row=record.end_row,
                        message=exc.message,
                    )
                )
            self._so_far = replace(
                self._so_far,
                n_files=self._so_far.n_files + 1,
                size_bytes=self._so_far.size_bytes + record.n_rows * column.row_bytes,
            )

    def _note(self, damage: Damage) -> None:
        damages = (*self._so_far.damages, damage)[:MAX_DAMAGES]
        self._so_far = replace(self._so_far, n_damaged=self._so_far.n_damaged + 1, damages=damages)
