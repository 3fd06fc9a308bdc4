"""Safetensors files written front to back while their number of rows is not known yet, and resumable after any crash.

    out/                       out.safetensors.part/        while rows arrive
      pull.json                  pull.json                  the rows and columns wanted, and how many rows are synced
      pull.lock                  pull.lock                  locked by the process that writes here
      token_id.safetensors.part  token_id.safetensors.part  one tensor per column: room for a header, then rows

Headers are written once all rows have arrived; only then do the files lose `.part`: each `.safetensors` opens. For
a single file the columns are then joined, and the folder is removed.
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

HEADER_BYTES = 4096  # One page, so that rows are aligned when the file is mapped.
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
    """One column: a matrix with `width` elements a row, or a vector if `width` is None."""

    name: str
    dtype: str
    width: int | None
    row_bytes: int

    def path(self, folder: Path) -> Path:
        """Returns the column's finished file in a folder."""
        return folder / f"{self.name}.safetensors"

    def part(self, folder: Path) -> Path:
        """Returns the column's file while it is written."""
        return folder / f"{self.name}.safetensors.part"

    def entry(self, n_rows: int, start: int) -> dict[str, Any]:
        """Returns the column's entry in a safetensors header; its data begin at byte `start`."""
        shape = [n_rows] if self.width is None else [n_rows, self.width]
        return {"dtype": _DTYPES[self.dtype], "shape": shape, "data_offsets": [start, start + n_rows * self.row_bytes]}


class ColumnFile:
    """The file of one column, which has `n_rows` rows: `write()` more, `sync()`, and `finish()` with the header."""

    def __init__(self, folder: Path, spec: ColumnSpec, n_rows: int) -> None:
        check_rows(folder, spec, n_rows)
        self.spec = spec
        self._finished, self._part = spec.path(folder), spec.part(folder)
        if not self._part.exists() and self._finished.exists():  # A crash cut the finish of all columns short.
            self._finished.rename(self._part)
        self._file: IO[bytes] = self._part.open("r+b" if self._part.exists() else "w+b")
        # Rows after the last sync may be torn by a crash: they are cut off, and pulled again.
        self._file.truncate(HEADER_BYTES + n_rows * spec.row_bytes)
        self._file.seek(0, os.SEEK_END)

    def write(self, rows: memoryview) -> None:
        """Appends rows."""
        self._file.write(rows)

    def sync(self) -> None:
        """Brings all written rows to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, n_rows: int, metadata: Mapping[str, str]) -> None:
        """Writes the header into the space before the rows, syncs, and gives the file its name."""
        self._file.seek(0)
        self._file.write(_header([(self.spec, 0)], n_rows, metadata, HEADER_BYTES))
        self.sync()
        self._part.rename(self._finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def check_rows(folder: Path, column: ColumnSpec, n_rows: int) -> None:
    """Raises DataLoss unless a column's file holds `n_rows` rows: missing rows must not be replaced by zeros."""
    from headrace_client.errors import DataLoss  # noqa: PLC0415

    path = column.path(folder) if column.path(folder).exists() else column.part(folder)
    size_bytes = path.stat().st_size if path.exists() else 0
    n_found = max(size_bytes - HEADER_BYTES, 0) // column.row_bytes
    if n_found < n_rows:
        raise DataLoss(
            f"{path.name} holds {n_found} rows, but {STATE_FILE} says that {n_rows} were written",
            reason="ROWS_MISSING",
            remedy=f"put the file back as it was; or remove {folder}, and pull all rows again",
        )


def check_whole(path: Path) -> None:
    """Raises DataLoss unless a finished file is as long as its header says."""
    from headrace_client.errors import DataLoss  # noqa: PLC0415

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    due = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    found = path.stat().st_size
    if found != due:
        raise DataLoss(
            f"{path} has {found} bytes, but its header says {due}",
            reason="ROWS_MISSING",
            remedy="put the file back as it was; or remove it, and pull all rows again",
        )


def join(columns: Sequence[ColumnSpec], folder: Path, n_rows: int, metadata: Mapping[str, str], out: Path) -> None:
    """Joins finished columns into the file `out`, which appears whole or not at all."""
    if len(columns) == 1:
        joined = columns[0].path(folder)  # Its own header is the file's.
    else:
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
    joined.replace(out)
    fsync_folder(out.parent)


def remove(folder: Path) -> None:
    """Removes the folder of a pull.

    Columns first, then the state that describes them, then the lock: a crash in between leaves a folder that the next
    pull understands.
    """
    last = {STATE_FILE: 1, LOCK_FILE: 2}
    for path in sorted(folder.iterdir(), key=lambda path: last.get(path.name, 0)):
        path.unlink()
    with suppress(OSError):  # Another pull has just made its lock file here; it will find the finished file.
        folder.rmdir()


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a finished file; empty if the file is not a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 100_000_000:  # The format's limit: anything else is no header.
            return {}
        try:
            return dict(json.loads(file.read(length)).get("__metadata__", {}))
        except (ValueError, AttributeError):
            return {}


def read_state(folder: Path) -> dict[str, Any] | None:
    """Reads the state of a pull; None if the folder has none."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state


def is_used(folder: Path) -> bool:
    """True if a folder without a state holds files that are not from a pull that has just begun."""
    return folder.exists() and any(path.name not in (LOCK_FILE, _NEW_STATE_FILE) for path in folder.iterdir())


def has_rows(folder: Path, state: Mapping[str, Any]) -> bool:
    """True if a pull has begun to write. A pull that was refused, for a mistyped column say, leaves nothing to keep."""
    return state["next_row"] > state["identity"]["start_row"] or any(
        path.name not in (LOCK_FILE, STATE_FILE, _NEW_STATE_FILE) for path in folder.iterdir()
    )


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replaces the state; a crash leaves the old one or the new one."""
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
    """Returns a safetensors header: its length, then JSON, padded to `size_bytes` (0: to a multiple of 64)."""
    entries = {column.name: column.entry(n_rows, start) for column, start in columns}
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    length = size_bytes - 8 if size_bytes else len(text) + -(len(text) + 8) % 64
    assert len(text) <= length, "names and metadata fit into the space kept for them"
    return length.to_bytes(8, "little") + text.ljust(length)
