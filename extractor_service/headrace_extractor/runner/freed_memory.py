"""Keeps the memory of one forward pass for the next.

A pass over a batch allocates hundreds of blocks of megabytes and frees them. glibc returns such blocks to the system,
which clears every page again for the next pass: a tenth of the processor time of a small model. Other C libraries are
left as they are, and so is a GPU's memory, which torch keeps in any case.

Source: mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER_TRIM = 2**31 - 1
# Blocks up to this size are kept. Older versions of glibc refuse more than the second number.
_LARGEST_KEPT = (2**30, 2**25)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keeps memory that is freed in the block with the process until the block ends.

    The thresholds stay as set here: memory that is freed after the block goes back at the end of the next block.
    """
    with suppress(AttributeError):  # No mallopt: not glibc.
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
        any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_KEPT)
    try:
        yield
    finally:
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
