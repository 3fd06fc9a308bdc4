"""Rounding: how far rows are apart, how far rounding alone brings them, and passes with little of it."""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# R rows · D model width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# A row that is shorter than this share of the usual one is what is left where larger terms cancel; rounding goes by
# these terms, so the row is measured against this share.
_SHORT = 0.01
# Errors of rows that rounding makes in networks of some dozens of blocks, usually and at most.
_USUAL = {torch.float32: 2e-5, torch.float16: 0.004, torch.bfloat16: 0.03}
_MOST = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def least_beyond_rounding(dtype: torch.dtype) -> float:
    """Returns the least error of a row that says anything, in passes of this dtype."""
    return _USUAL.get(dtype, _USUAL[torch.bfloat16])


def most_of_rounding(dtype: torch.dtype) -> float:
    """Returns the largest error of a row that can be rounding, in passes of this dtype."""
    return _MOST.get(dtype, _MOST[torch.bfloat16])


def row_errors(found_RD: Tensor, expected_RD: Tensor) -> Tensor:
    """Returns `[R]`, the length of each row's difference in terms of the expected row's length; NaN rows give 0."""
    found_RD, expected_RD = found_RD.float(), expected_RD.float()
    lengths_R = expected_RD.norm(dim=-1)
    usual = lengths_R.nan_to_num(posinf=0.0).median()
    errors_R = (found_RD - expected_RD).norm(dim=-1) / lengths_R.clamp(min=_SHORT * usual).clamp(min=1e-30)
    return errors_R.nan_to_num()


def is_quantized(model: PreTrainedModel) -> bool:
    """True for weights that a quantizer stored; no kernel computes with them in float32."""
    return getattr(model.config, "quantization_config", None) is not None


@contextmanager
def in_float32(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Lets blocks compute in float32 during the passes in the block, whatever the dtype of their weights.

    One block's weights at a time are widened, which is exact, and the stored ones are put back behind it.
    """
    stored: list[tuple[Tensor, Tensor]] = []

    def narrow(*_: Any) -> None:
        while stored:
            tensor, data = stored.pop()
            tensor.data = data

    def widen(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for tensor in chain(block.parameters(), block.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                stored.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        wide: tuple[tuple[Any, ...], dict[str, Any]] = _each((args, kwargs), _widened)
        return wide

    handles = [block.register_forward_pre_hook(widen, with_kwargs=True) for block in blocks]
    # Before the hooks of a capture, which may end the pass: hooks run in the order of their registration.
    handles += [block.register_forward_hook(narrow) for block in blocks]
    try:
        yield
    finally:
        narrow()
        for handle in handles:
            handle.remove()


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a copy of nested tuples, lists and dicts with each of their values changed."""
    if type(value) in (tuple, list):
        return type(value)(_each(part, change) for part in value)
    if type(value) is dict:
        return {key: _each(part, change) for key, part in value.items()}
    return change(value)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
