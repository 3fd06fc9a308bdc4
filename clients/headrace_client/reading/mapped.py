"""Rows straight from the files of a set, for a client that sees the server's very folder.

The server announces ranges of sealed rows, which it has compared with their digests and which never change. They are
read, not mapped: a mapped file that shrinks would end the process. A random number that the server has written into the
folder proves that it is the same one. Any mismatch when rows are announced raises Unmappable: then rows travel in
messages. Files that change after that raise DigestMismatch where the rows are used.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from headrace_client.errors import DigestMismatch
from headrace_client.reading.chunk import ActivationChunk
from headrace_client.values import StreamHeader
from headrace_log.errors import LogError
from headrace_log.frames import Chunk
from headrace_log.holding import Hold
from headrace_log.reader import KEPT_SEGMENTS, SetReader, UnreadRun

_NONCE_NAME = "nonce"
# Rows that are read into memory of a chunk's own are still in the processor's cache when they are used.
_CHUNK_BYTES = 2 * 1024 * 1024
_UNREADABLE = (OSError, LogError, ValueError)  # ValueError: a nonce that is no text.


class Unmappable(Exception):
    """This process can't read the rows from files: another host, another container, or the files are gone."""


def seems_here(path: str) -> bool:
    """True if there is a set at `path`: then the server is asked for its nonce."""
    try:
        return bool(path) and (Path(path) / "manifest.json").exists()
    except OSError:
        return False


class MappedRows:
    """The files of the set that a stream's header names. Raises Unmappable."""

    def __init__(self, header: StreamHeader) -> None:
        folder = Path(header.path)
        self._columns = header.columns
        try:
            self._hold = Hold(folder)  # The server ends the stream long before this reader has read all of the files.
            if not header.nonce or not hmac.compare_digest((folder / _NONCE_NAME).read_text("ascii"), header.nonce):
                raise Unmappable(f"{folder} is another folder than the server's")
            self._reader = SetReader(
                folder,
                [column.name for column in header.columns],
                # An order of blocks comes back to segments; in sequence, one is enough.
                keep_segments=KEPT_SEGMENTS if header.block_rows else 1,
            )
        except (*_UNREADABLE, KeyError) as exc:
            raise Unmappable(f"the set in {folder} can't be read: {exc}") from exc
        on_disk = [(column.name, str(column.dtype), column.width) for column in self._reader.columns]
        if on_disk != [(column.name, str(column.dtype), column.width) for column in header.columns]:
            self.close()
            raise Unmappable(f"the set in {folder} has other columns than the stream")

    def chunks(self, announced: Chunk, place: int) -> Iterator[ActivationChunk]:
        """Finds a range of rows: chunks that each lie in one segment, and are read where they are used."""
        row, end_row = announced.first_row, announced.end_row
        most_rows = max(1, _CHUNK_BYTES // self._reader.row_bytes)
        self._reader.forget_replaced_files()  # The server has compared the files that are in their places now.
        while row < end_row:
            try:
                if not self._reader.sealed_after(row):
                    raise Unmappable(f"row {row} is not sealed in the folder as it is seen from here")
                run = self._reader.find(row, most_rows, end_row=end_row)
                run.expect()
            except _UNREADABLE as exc:
                raise Unmappable(f"row {row} can't be read: {exc}") from exc
            unread = _Unread(run)
            yield ActivationChunk(
                first_row=row,
                n_rows=run.n_rows,
                place=place + row - announced.first_row,
                columns=self._columns,
                buffers=unread,
                in_files=unread,
                size_bytes=run.n_rows * self._reader.row_bytes,
            )
            row = run.end_row

    def close(self) -> None:
        """Releases the files; chunks that were handed out stay valid."""
        self._reader.close()
        self._hold.close()


class _Unread(Sequence[memoryview]):
    """The columns of a run, read where they are used: the bytes are then still in that processor's cache."""

    def __init__(self, run: UnreadRun) -> None:
        self._run = run
        self._read: tuple[memoryview, ...] = ()

    @overload
    def __getitem__(self, at: int) -> memoryview: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[memoryview]: ...
    def __getitem__(self, at: int | slice) -> memoryview | Sequence[memoryview]:
        if not self._read:
            with self._typed():
                self._read = tuple(view.toreadonly() for view in self._run.read().columns)
        return self._read[at]

    def read_into(self, column: int, offset: int, rows: memoryview) -> None:
        """Implements InFiles."""
        with self._typed():
            self._run.read_into(column, offset, rows)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as exc:
            raise DigestMismatch(
                f"rows {self._run.first_row} to {self._run.end_row} can't be read any more: {exc}",
                remedy="open the stream again at these rows: the server then tells what is damaged",
            ) from exc

    def __len__(self) -> int:
        return len(self._run.columns)
