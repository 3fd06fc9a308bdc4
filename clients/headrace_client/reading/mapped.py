"""Rows straight from the files of a set, for a client that sees the server's very folder.

The server announces ranges of sealed rows, which never change. A random number that the server has written into the
folder proves that it is the same one. Any mismatch raises Unmappable: then rows travel in messages.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from pathlib import Path

from headrace_client.reading.chunk import ActivationChunk
from headrace_client.values import StreamHeader
from headrace_log.errors import LogError
from headrace_log.frames import Chunk
from headrace_log.holding import Hold
from headrace_log.reader import KEPT_SEGMENTS, SetReader

_NONCE_NAME = "nonce"
_UNREADABLE = (OSError, LogError, ValueError)  # ValueError: a nonce that is no text, or the mapping of an empty file.


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
                handed_on=True,
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
        """Maps a range of rows: one chunk for each segment that it touches."""
        row, end_row = announced.first_row, announced.end_row
        while row < end_row:
            try:
                if not self._reader.sealed_after(row):
                    raise Unmappable(f"row {row} is not sealed in the folder as it is seen from here")
                run = self._reader.read(row, end_row - row, end_row=end_row)
            except _UNREADABLE as exc:
                raise Unmappable(f"row {row} can't be read: {exc}") from exc
            yield ActivationChunk(
                first_row=row,
                n_rows=run.n_rows,
                place=place + row - announced.first_row,
                columns=self._columns,
                buffers=tuple(view.toreadonly() for view in run.columns),
                size_bytes=run.n_rows * self._reader.row_bytes,
            )
            row = run.end_row

    def close(self) -> None:
        """Releases the files; chunks that were handed out stay valid."""
        self._reader.close()
        self._hold.close()
