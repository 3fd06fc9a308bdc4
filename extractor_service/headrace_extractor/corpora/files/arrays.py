"""Reads token ids from NumPy's `.npy` files: each row is a document; an array of one dimension is a single document.

The file is read once and forwards, a MiB at a time. It is not mapped: another process may shorten the file meanwhile,
and reading a mapping beyond the end of its file ends the process.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from headrace_extractor.corpora.files import contents
from headrace_extractor.corpora.files.contents import TOKEN_LIMIT, beyond_int32, malformed, too_large

NPY_MAGIC = b"\x93NUMPY"
_BLOCK_BYTES = 1024 * 1024
_MAX_HEADER_BYTES = 64 * 1024


def parse_npy(file: BinaryIO) -> Iterator[bytes]:
    """Yields documents as little-endian int32; raises CorpusMalformed, with `document` if the error is in one."""
    n_rows, row_length, dtype = _read_header(file)
    if row_length * 4 > contents.MAX_DOCUMENT_BYTES:
        raise too_large("A row of the array", document=0)
    row_bytes = row_length * dtype.itemsize
    if not row_bytes:
        return
    rows_at_once = max(1, _BLOCK_BYTES // row_bytes)
    for first in range(0, n_rows, rows_at_once):
        n_wanted = min(rows_at_once, n_rows - first)
        data = file.read(n_wanted * row_bytes)
        if len(data) < n_wanted * row_bytes:
            raise malformed(f"The file ends within row {first + len(data) // row_bytes} of {n_rows}; copy it again.")
        block = np.frombuffer(data, dtype=dtype).reshape(n_wanted, row_length)
        if block.size and (int(block.min()) < 0 or int(block.max()) >= TOKEN_LIMIT):
            wrong = ((block < 0) | (block >= TOKEN_LIMIT)).any(axis=1)
            document = first + int(np.flatnonzero(wrong)[0])
            raise beyond_int32(f"Row {document}, counted from 0,", document=document)
        for row in block.astype("<i4"):
            yield row.tobytes()


def _read_header(file: BinaryIO) -> tuple[int, int, np.dtype[Any]]:
    """Returns the number of rows, their length and the type of their items."""
    try:
        major, _ = npy.read_magic(file)
        read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Headers of Python 2 are read all the same.
            shape, fortran_order, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
    except Exception as exc:
        # The header is Python's own syntax, and a crooked one fails in any part of Python's parser.
        raise malformed(f"The file is no readable .npy: {type(exc).__name__}: {str(exc)[:300]}") from exc
    if dtype.kind not in "iu":
        raise malformed(f"The array is of type {dtype}; token ids are integers.", type=dtype)
    if len(shape) not in (1, 2):
        raise malformed(f"The array has {len(shape)} dimensions; make it one document a row.", shape=shape)
    if any(extent < 0 for extent in shape):
        raise malformed(f"No array has the shape {shape}.", shape=shape)
    if fortran_order and len(shape) == 2 and min(shape) > 1:
        raise malformed("The array lies column by column; save numpy.ascontiguousarray of it.")
    if math.prod(shape) >= 2**62:
        raise malformed(f"No file holds an array of shape {shape}.", shape=shape)
    n_rows, row_length = shape if len(shape) == 2 else (1, shape[0])
    return n_rows, row_length, dtype
