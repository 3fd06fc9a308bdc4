"""The files of a pull's columns, written and synced together."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace_cli.pulling.tensor_files import ColumnFile, ColumnSpec
from headrace_log.files import fsync_folder

_SYNC_EVERY_S = 5.0  # Rows of at most so many seconds have to be pulled again after a crash.


class ColumnFiles:
    """One file per column, open for the `with` block, each with `n_rows` rows; a sync is due after `sync_bytes`."""

    def __init__(
        self, folder: Path, columns: Sequence[ColumnSpec], n_rows: int, *, sync_bytes: float = math.inf
    ) -> None:
        self.n_rows = n_rows
        self._folder = folder
        self._n_synced = n_rows
        self._row_bytes = sum(column.row_bytes for column in columns)
        self._sync_bytes = sync_bytes
        self._synced_at = time.monotonic()
        with ExitStack() as stack:
            self._files = [stack.enter_context(ColumnFile(folder, column, n_rows)) for column in columns]
            fsync_folder(folder)
            self._stack = stack.pop_all()

    @property
    def is_behind(self) -> bool:
        """True while some rows are written but not synced."""
        return self.n_rows > self._n_synced

    @property
    def sync_is_due(self) -> bool:
        """True when many bytes, or rows written several seconds ago, would be lost in a crash."""
        unsynced_bytes = (self.n_rows - self._n_synced) * self._row_bytes
        return unsynced_bytes >= self._sync_bytes or time.monotonic() - self._synced_at > _SYNC_EVERY_S

    def write(self, buffers: Sequence[memoryview], n_rows: int) -> None:
        """Appends `n_rows` rows; `buffers` holds one buffer per column."""
        for file, rows in zip(self._files, buffers, strict=True):
            file.write(rows)
        self.n_rows += n_rows

    def sync(self) -> None:
        """Brings all written rows to disk."""
        if self.is_behind:
            for file in self._files:
                file.sync()
        self._n_synced, self._synced_at = self.n_rows, time.monotonic()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the headers, syncs, and gives the files their names."""
        for file in self._files:
            file.finish(self.n_rows, metadata)
        fsync_folder(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
