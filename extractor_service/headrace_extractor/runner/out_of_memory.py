"""Tells a device without memory from other errors of torch."""

from __future__ import annotations

import torch


def is_out_of_memory(exc: BaseException) -> bool:
    """True for torch's errors about memory: CUDA's has a type of its own, those of CPUs and of MPS are told by text."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(exc, RuntimeError) and any(text in str(exc) for text in texts)
