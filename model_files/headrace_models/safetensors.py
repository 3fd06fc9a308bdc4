"""Headers of safetensors files: 8 bytes with the header's length (little-endian), then JSON that lists the tensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace_models.errors import HeaderInvalid, TooManyTensors

# The format allows 100 MB, which take a minute and gigabytes to parse; the largest published headers have a few.
MAX_HEADER_BYTES = 32 * 1024 * 1024
_FORMAT_HEADER_BYTES = 100_000_000
# The largest published models have a tenth of so many tensors in all their files.
MAX_TENSORS = 200_000
_LENGTH_BYTES = 8
# numpy and torch have no tensor of more dimensions; multiplying a million of them would take minutes.
_MAX_DIMENSIONS = 64
# The format has some twenty, such as F32 and F8_E4M3, and grows.
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,31}")
# The format counts in 64 bits; below the sign bit, a count also fits into a database's integers.
_MAX_COUNT = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a header; its data are the bytes `[start, end)` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def n_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of a file by name; `size_bytes` counts the header's own bytes, those of its length included."""

    tensors: Mapping[str, TensorEntry]
    size_bytes: int

    @property
    def file_bytes(self) -> int:
        """Size of a whole file with this header; a shorter file was cut."""
        return self.size_bytes + max((tensor.end for tensor in self.tensors.values()), default=0)


def read_header(path: Path) -> Header:
    """Reads the header of a file, and nothing behind it.

    Raises HeaderInvalid, TooManyTensors for a header beyond our bounds, and OSError as `open` does.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file_bytes < _LENGTH_BYTES or length > min(_FORMAT_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
            raise HeaderInvalid(f"{path.name} is cut or no safetensors file")
        if length > MAX_HEADER_BYTES:
            raise TooManyTensors(f"the header of {path.name} has {length} bytes, and Headrace reads {MAX_HEADER_BYTES}")
        raw = file.read(length)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise HeaderInvalid(f"{path.name} has a header that is no safetensors header") from exc
    return Header(tensors=entries_from(document, source=path.name), size_bytes=_LENGTH_BYTES + length)


def entries_from(document: object, *, source: str) -> dict[str, TensorEntry]:
    """Checks the JSON of a header and returns its tensors by name. Raises HeaderInvalid or TooManyTensors."""
    invalid = HeaderInvalid(f"{source} has a header that is no safetensors header")
    if not isinstance(document, dict):
        raise invalid
    if len(document) > MAX_TENSORS:
        raise TooManyTensors(f"{source} lists {len(document)} tensors, and Headrace reads {MAX_TENSORS}")
    tensors = {}
    for name, entry in document.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if _DTYPE.fullmatch(dtype):
                counts = (*shape, start, end)
            case _:
                raise invalid
        if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= _MAX_COUNT for n in counts):
            raise invalid
        tensor = TensorEntry(dtype=dtype, shape=tuple(shape), start=start, end=end)
        # No dtype has elements of less than a bit: whatever a header says, its file bounds the number of elements.
        if not tensor.n_elements <= 8 * tensor.n_bytes:
            raise invalid
        tensors[name] = tensor
    return tensors
