"""Names, dtypes and paths of an activation set."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

# Column names become names of folders.
_COLUMN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}$")

OPEN_SUFFIX = ".open"


class Dtype(StrEnum):
    """Element type of a column; little-endian."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT32 = "int32"
    INT8 = "int8"
    FLOAT8_E4M3 = "float8_e4m3"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]

    @property
    def safetensors_name(self) -> str:
        """Spelling in a safetensors header."""
        return _SAFETENSORS_NAME[self]


_ITEMSIZE = {
    Dtype.FLOAT32: 4,
    Dtype.FLOAT16: 2,
    Dtype.BFLOAT16: 2,
    Dtype.INT32: 4,
    Dtype.INT8: 1,
    Dtype.FLOAT8_E4M3: 1,
}
_SAFETENSORS_NAME = {
    Dtype.FLOAT32: "F32",
    Dtype.FLOAT16: "F16",
    Dtype.BFLOAT16: "BF16",
    Dtype.INT32: "I32",
    Dtype.INT8: "I8",
    Dtype.FLOAT8_E4M3: "F8_E4M3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """One column: `width` elements of `dtype` a row; `shape` of a row of several dimensions, such as heads x width.

    `scale_column` of an 8-bit column names the float32 column, one scale a row, that its values are multiplied by.
    """

    name: str
    dtype: Dtype
    width: int
    scale_column: str | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _COLUMN_NAME.match(self.name):
            raise ValueError(f"{self.name!r} can't name a column: use letters, digits and _ . : -")
        if self.width < 1:
            raise ValueError(f"column {self.name} has width {self.width}; it must be at least 1")
        if self.shape and (min(self.shape) < 1 or math.prod(self.shape) != self.width):
            raise ValueError(f"column {self.name} has shape {list(self.shape)}, which is not {self.width} elements")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def is_provenance(self) -> bool:
        """True for the three columns that tell where a row comes from: token_id, document, position."""
        return self.name in _PROVENANCE_NAMES

    def to_json(self) -> dict[str, Any]:
        """Returns the column's entry in the manifest."""
        entry: dict[str, Any] = {"name": self.name, "dtype": str(self.dtype), "width": self.width}
        entry |= {"scale_column": self.scale_column} if self.scale_column else {}
        return entry | ({"shape": list(self.shape)} if self.shape else {})

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ColumnSpec:
        """Inverse of `to_json`."""
        return cls(
            name=entry["name"],
            dtype=Dtype(entry["dtype"]),
            width=entry["width"],
            scale_column=entry.get("scale_column"),
            shape=tuple(entry.get("shape", ())),
        )


def scale_column(column: str) -> str:
    """Returns the name of the column with the scales of an 8-bit column."""
    return f"{column}.scale"


TOKEN_ID = ColumnSpec(name="token_id", dtype=Dtype.INT32, width=1)
DOCUMENT = ColumnSpec(name="document", dtype=Dtype.INT32, width=1)
POSITION = ColumnSpec(name="position", dtype=Dtype.INT32, width=1)
PROVENANCE = (TOKEN_ID, DOCUMENT, POSITION)
_PROVENANCE_NAMES = frozenset(column.name for column in PROVENANCE)


def column_folder(folder: Path, column: ColumnSpec) -> Path:
    """Returns the folder of a column's segments: `token_id`, `blocks.3.hook_resid_post/bfloat16`."""
    return folder / column.name if column.is_provenance else folder / column.name / str(column.dtype)


def segment_path(folder: Path, column: ColumnSpec, segment: int) -> Path:
    """Returns the path of a sealed segment's file."""
    return column_folder(folder, column) / f"{segment:08d}.safetensors"


def open_segment_path(folder: Path, column: ColumnSpec, segment: int) -> Path:
    """Returns the path of the same file while the segment is open."""
    return column_folder(folder, column) / f"{segment:08d}.safetensors{OPEN_SUFFIX}"
