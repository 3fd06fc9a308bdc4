"""An activation set on this node: its folder, the facts that its files hold, and the extractions that use it.

Manifest and index are read here and nowhere else in the server, and remembered until they change on disk: a runner
appends to them, and an evicted set may be computed anew in the same folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from headrace_chassis.errors import ServiceError
from headrace_extractor.node.runner_protocol import N_SKIPPED
from headrace_extractor.sets.integrity import Integrity
from headrace_extractor.sets.log_errors import log_errors_as_typed
from headrace_extractor.sets.notes import HeldSet, SetNotes, note_use
from headrace_extractor.sets.receipt import ParityReceipt, receipt_of
from headrace_log import retention
from headrace_log.errors import SetCorrupt
from headrace_log.files import write_atomically
from headrace_log.finite import non_finite
from headrace_log.index import SegmentIndex, SegmentRecord, dropped_rows
from headrace_log.layout import ColumnSpec
from headrace_log.manifest import FILE_NAME as MANIFEST_NAME
from headrace_log.manifest import Manifest

NONCE_NAME = "nonce"
MAX_HOLDERS = 20

logger = logging.getLogger(__name__)


class Kind(StrEnum):
    """How long a set keeps its rows; the values as manifests spell them."""

    RETAIN = "retain"
    WINDOW = "window"


class User(Protocol):
    """An extraction, as the set that it writes and reads sees it."""

    @property
    def holds_set(self) -> bool:
        """True while the set must stay on disk for it."""

    @property
    def holds_set_itself(self) -> bool:
        """True while it needs the set, and not only its readers do."""

    @property
    def reader_names(self) -> Sequence[str]:
        """Names of its attached readers."""

    @property
    def id(self) -> str:
        """Its id."""


@dataclass(slots=True)
class _Files:
    """The files of a set as they were read; `seen` are inode, time and size of the manifest."""

    seen: tuple[int, int, int]
    manifest: Manifest
    index: SegmentIndex = field(default_factory=SegmentIndex)


class ActivationSet:
    """One set on this node. `ActivationSets` makes them, one object for each folder that is in use.

    Digests are compared in `threads`, until `closing`. Methods that read files raise DigestMismatch and TooManyStreams.
    """

    def __init__(self, set_id: str, folder: Path, kind: Kind, *, threads: Executor, closing: threading.Event) -> None:
        self.id = set_id
        self.folder = folder
        self.kind = kind
        self.users: list[User] = []
        self.integrity = Integrity(folder, closing)
        self._threads = threads
        self._files: _Files | None = None
        self._last_index: SegmentIndex | None = None
        self._nonce = ""

    @property
    def is_window(self) -> bool:
        """True if the set keeps a bounded number of bytes, and the forward pass waits for its readers."""
        return self.kind is Kind.WINDOW

    @property
    def exists(self) -> bool:
        """True if the set is on disk."""
        return (self.folder / MANIFEST_NAME).exists()

    @property
    def held(self) -> bool:
        """True while an extraction or a reader of this server needs the set; other processes hold a lock instead."""
        return any(user.holds_set for user in self.users)

    @property
    def holders(self) -> tuple[str, ...]:
        """Names of the readers that hold the set now, then ids of the extractions that do."""
        readers = [name for user in self.users for name in user.reader_names]
        return (*readers, *(user.id for user in self.users if user.holds_set_itself))

    def manifest(self) -> Manifest:
        """The manifest as it is on disk. Raises FileNotFoundError without a set."""
        stat = (self.folder / MANIFEST_NAME).stat()
        seen, known = (stat.st_ino, stat.st_mtime_ns, stat.st_size), self._files
        if known is None or seen != known.seen:
            with log_errors_as_typed():
                # The index starts anew too: after an eviction, another set may have been made in the same folder.
                known = self._files = _Files(seen, Manifest.load(self.folder))
        return known.manifest

    def index(self) -> SegmentIndex:
        """The sealed segments as of now, without those that are known to be damaged; empty if there is no set."""
        try:
            manifest = self.manifest()
        except FileNotFoundError:
            return SegmentIndex()
        files = self._files
        assert files is not None
        try:
            index = files.index.refreshed(self.folder)
        except SetCorrupt as exc:
            logger.error("%s", exc)  # noqa: TRY400 -- no bug: the message says it all
            files.index = SegmentIndex()
            self.integrity.note_unreadable_index()
            self.integrity.try_to_mend()
            with log_errors_as_typed():
                return self.integrity.visible(SegmentIndex.load_readable(self.folder))
        # Kept beside the manifest that was read: a slow thread can't give a new set the index of an old one.
        files.index = index
        before, self._last_index = self._last_index, index
        if before is not None and before is not index:  # Else nothing is known of the process that sealed them.
            self.integrity.trust(manifest, before, index)
        return self.integrity.visible(index)

    def n_rows(self, columns: Sequence[str]) -> int:
        """Rows that are sealed in every one of `columns`."""
        return self.index().n_rows(columns)

    def has_all_rows(self, columns: Sequence[str]) -> bool:
        """True if the set's extent is known and all its rows are sealed in every one of `columns`."""
        return self.exists and self.manifest().total_rows == self.n_rows(columns)

    def n_non_finite(self, columns: Sequence[str], end_row: int) -> Mapping[str, int]:
        """NaN and infinite values of the rows before `end_row`, by column; columns without any are left out."""
        with log_errors_as_typed():
            return non_finite(self.folder, self.index(), columns, end_row)

    def n_skipped(self, columns: Sequence[str]) -> int:
        """Documents that were skipped before the rows sealed in these columns end."""
        index = self.index()
        last = index.find(index.n_rows(columns) - 1)
        return int(last.resume.get(N_SKIPPED, 0)) if last else 0

    def first_kept_row(self) -> int:
        """The first row that was not dropped; not 0 only in a WINDOW set."""
        with log_errors_as_typed():
            return dropped_rows(self.folder)

    async def look_for_damage(self, columns: Sequence[str], n_rows: int) -> None:
        """Takes damaged segments out of the first `n_rows` rows (0: all) of columns; see `Integrity`."""
        index = self.index()
        if index.records:
            look = self.integrity.look_for_damage
            await self._in_thread(look, self.manifest(), index, columns, n_rows)

    async def check_segment(self, record: SegmentRecord, columns: Sequence[ColumnSpec]) -> None:
        """Compares a segment of some columns with its digests. Raises DigestMismatch; its rows are then missing."""
        await self._in_thread(self.integrity.check, self.manifest(), record, columns)

    async def mend(self) -> None:
        """Takes the damage found so far out of the set. Raises WaitTimeout while another process writes the set."""
        if self.integrity.is_damaged:
            await self._in_thread(self.integrity.mend)

    async def _in_thread(self, work: Callable[..., None], *arguments: Any) -> None:
        with log_errors_as_typed():
            await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def drop_before(self, row: int) -> int:
        """Removes the sealed segments that end at or before `row`; returns the first row kept. Raises DiskFull."""
        with log_errors_as_typed():
            return retention.drop_before(self.folder, row, self.index())

    def receipt(self, columns: Sequence[str]) -> ParityReceipt | None:
        """The parity receipt of these columns; None if they have none, or the set is gone."""
        with contextlib.suppress(FileNotFoundError, ServiceError):
            return receipt_of(self.manifest(), columns)
        return None

    def create(self, manifest: Manifest, *, model_id: str, corpus_id: str) -> None:
        """Writes the set's first files. Raises DiskFull."""
        manifest.save(self.folder)
        SetNotes(model_id=model_id, corpus_id=corpus_id).save(self.folder)

    def add_columns(self, columns: Sequence[ColumnSpec]) -> None:
        """Adds the columns that the set lacks to its manifest. Raises DiskFull."""
        with log_errors_as_typed():
            Manifest.update(self.folder, lambda known: known.with_columns(columns))

    def delete(self) -> None:
        """Removes the set from disk."""
        retention.delete_set(self.folder)

    def note_use(self) -> None:
        """Notes that the set is used now, for eviction by least recent use."""
        note_use(self.folder)

    def nonce(self) -> str:
        """A random word in a file that every process may read: a client that knows it sees the same folder.

        It is written anew if the file is gone. Raises OSError or DiskFull if it can't be.
        """
        path = self.folder / NONCE_NAME
        with contextlib.suppress(FileNotFoundError):
            if self._nonce and path.read_text("ascii") == self._nonce:
                return self._nonce
        self._nonce = secrets.token_hex(16)
        write_atomically(path, self._nonce.encode())
        return self._nonce

    def report(self, *, n_rows: int = 0, holders: Sequence[str] = ()) -> HeldSet:
        """The set as the registry is told of it. Raises the log's errors if its files can't be read.

        `n_rows` are rows that all columns have although they are not sealed yet.
        """
        try:
            manifest = self.manifest()
        except FileNotFoundError:
            return HeldSet.gone(self.id, self.folder)
        notes = SetNotes.load(self.folder)
        columns = tuple(column.name for column in manifest.columns)
        n_rows = max(n_rows, self.n_rows(columns))
        return HeldSet(
            id=self.id,
            model_id=notes.model_id,
            corpus_id=notes.corpus_id,
            columns=columns,
            retention=self.kind.upper(),
            path=str(self.folder),
            n_rows=n_rows,
            size_bytes=retention.size_bytes(self.folder),
            complete=manifest.complete and n_rows == manifest.total_rows,
            last_used=notes.last_used or time.time(),
            holders=tuple(holders)[:MAX_HOLDERS],
            identity_json=json.dumps(manifest.identity, separators=(",", ":")),
        )
