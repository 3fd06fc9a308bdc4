"""Safetensors files written front to back while their number of rows is not known yet, and resumable after any crash.

    out/                       out.safetensors.part/        while rows come
      pull.json                  pull.json                  what is pulled, and how many rows are safely on disk
      pull.lock                  pull.lock                  locked by the process that writes here
      token_id.safetensors       token_id.safetensors       one tensor a column: space for the header, then the rows

Headers are written when all rows are there. For a single file the columns are then joined, and the folder goes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from headrace_log.files import fsync_folder

HEADER_BYTES = 4096  # The rows of a column begin on a page.
STATE_FILE = "pull.json"
LOCK_FILE = "pull.lock"
_NEW_STATE_FILE = f"{STATE_FILE}.new"
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int8": "I8",
    "float8_e4m3": "F8_E4M3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """One column: `width` elements a row, or a plain vector where it is None."""

    name: str
    dtype: str
    width: int | None
    row_bytes: int

    def path(self, folder: Path) -> Path:
        """Its file."""
        return folder / f"{self.name}.safetensors"

    def entry(self, n_rows: int, start: int) -> dict[str, Any]:
        """The column's entry in a safetensors header."""
        shape = [n_rows] if self.width is None else [n_rows, self.width]
        return {"dtype": _DTYPES[self.dtype], "shape": shape, "data_offsets": [start, start + n_rows * self.row_bytes]}


class ColumnFile:
    """One column on disk, which has `n_rows`: `write()` more, `sync()`, and `finish()` with the header."""

    def __init__(self, folder: Path, spec: ColumnSpec, n_rows: int) -> None:
        check_rows(folder, spec, n_rows)
        self.spec = spec
        self.path = spec.path(folder)
        self._file: IO[bytes] = self.path.open("r+b" if self.path.exists() else "w+b")
        # What was written behind the last sync may be torn: those rows come again.
        self._file.truncate(HEADER_BYTES + n_rows * spec.row_bytes)
        self._file.seek(0, os.SEEK_END)

    def write(self, rows: memoryview) -> None:
        """Appends rows."""
        self._file.write(rows)

    def sync(self) -> None:
        """Brings what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, n_rows: int, metadata: Mapping[str, str]) -> None:
        """Writes the header."""
        header = _header([(self.spec, 0)], n_rows, metadata, HEADER_BYTES)
        self._file.seek(0)
        self._file.write(header)
        self.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def check_rows(folder: Path, column: ColumnSpec, n_rows: int) -> None:
    """Raises DataLoss unless a column's file holds that many rows: zeros must not pass for those that went missing."""
    from headrace_client.errors import DataLoss  # noqa: PLC0415

    path = column.path(folder)
    size_bytes = path.stat().st_size if path.exists() else 0
    n_there = max(size_bytes - HEADER_BYTES, 0) // column.row_bytes
    if n_there < n_rows:
        raise DataLoss(
            f"{path.name} holds {n_there} rows, and {STATE_FILE} says that {n_rows} were written",
            reason="ROWS_MISSING",
            remedy=f"put the file back as it was; or remove {folder}, and pull all rows again",
        )


def join(columns: Sequence[ColumnSpec], folder: Path, n_rows: int, metadata: Mapping[str, str], out: Path) -> None:
    """Makes one file of finished columns, at once or not at all."""
    joined = columns[0].path(folder) if len(columns) == 1 else _joined(columns, folder, n_rows, metadata)
    joined.replace(out)
    fsync_folder(out.parent)


def _joined(columns: Sequence[ColumnSpec], folder: Path, n_rows: int, metadata: Mapping[str, str]) -> Path:
    starts, end = [], 0
    for column in columns:
        starts.append(end)
        end += n_rows * column.row_bytes
    joined = folder / "joined"
    with joined.open("wb") as file:
        file.write(_header(list(zip(columns, starts, strict=True)), n_rows, metadata, 0))
        for column in columns:
            with column.path(folder).open("rb") as part:
                part.seek(HEADER_BYTES)
                shutil.copyfileobj(part, file, 16 * 1024 * 1024)
        file.flush()
        os.fsync(file.fileno())
    return joined


def remove(folder: Path) -> None:
    """Removes the folder of a pull: the state behind all that it tells of, the lock behind the state."""
    last = {STATE_FILE: 1, LOCK_FILE: 2}
    for path in sorted(folder.iterdir(), key=lambda path: last.get(path.name, 0)):
        path.unlink()
    with suppress(OSError):  # Another pull looks in just now, and finds all done.
        folder.rmdir()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a finished file; empty for one that is none of ours."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 100_000_000:
            return {}
        try:
            return dict(json.loads(file.read(length)).get("__metadata__", {}))
        except (ValueError, AttributeError):
            return {}


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state of a pull in this folder; None if there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state


def is_used(folder: Path) -> bool:
    """True if a folder without a state holds something that is not from a pull which has only just begun."""
    return folder.exists() and any(path.name not in (LOCK_FILE, _NEW_STATE_FILE) for path in folder.iterdir())


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replaces the state at once or not at all."""
    new = folder / _NEW_STATE_FILE
    with new.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / STATE_FILE)
    fsync_folder(folder)


def _header(
    columns: Iterable[tuple[ColumnSpec, int]], n_rows: int, metadata: Mapping[str, str], size_bytes: int
) -> bytes:
    """A safetensors header: its length, then JSON, filled up with spaces to `size_bytes` (0: to a multiple of 64)."""
    entries = {column.name: column.entry(n_rows, start) for column, start in columns}
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    length = size_bytes - 8 if size_bytes else len(text) + -(len(text) + 8) % 64
    assert len(text) <= length, "names and metadata fit in the space kept for them"
    return length.to_bytes(8, "little") + text.ljust(length)
