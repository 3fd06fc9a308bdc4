"""Keeps documents that share a sequence apart, in the way that the model's code allows.

`position_ids` alone decide: a step other than +1 starts a document. Most models' code builds the mask from them. For
others a mask is passed, which transformers takes as it is when it has four dimensions; BLOOM's code takes none, so each
of its blocks is given the mask, and ALiBi that starts anew with each document. Where no document starts inside a
sequence, nothing is passed and attention is the model's own.
"""

# ruff: noqa: N803, N806 -- capital suffixes are shapes
# B sequences · S tokens in a sequence · H heads

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace_extractor.hookpoints.catalogue import cannot_isolate
from headrace_extractor.hookpoints.places import BY_BLOCK_MASK, BY_MASK, BY_POSITIONS


@contextmanager
def isolated(
    model: PreTrainedModel,
    position_ids_BS: Tensor,
    *,
    how: str,
    causal: bool,
    blocks: nn.ModuleList,
    takes_positions: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yields the arguments of a pass that keeps documents apart. Raises FieldInvalid where there is no way."""
    arguments = {"position_ids": position_ids_BS} if takes_positions else {}
    if how == BY_POSITIONS or not _shares(position_ids_BS):
        yield arguments
        return
    if how not in (BY_MASK, BY_BLOCK_MASK):
        raise cannot_isolate(model.config.model_type)
    mask = _mask(model, position_ids_BS, causal=causal)
    if how == BY_MASK:
        yield arguments | {"attention_mask": mask}
        return
    handles = [_give_mask(block, mask, position_ids_BS) for block in blocks]
    try:
        yield arguments
    finally:
        for handle in handles:
            handle.remove()


def _shares(position_ids_BS: Tensor) -> bool:
    return bool((position_ids_BS.diff(dim=1) != 1).any())


def _mask(model: PreTrainedModel, position_ids_BS: Tensor, *, causal: bool) -> Tensor:
    """True, or 0 for eager attention, where a token may look."""
    starts_BS = torch.zeros_like(position_ids_BS)
    starts_BS[:, 1:] = position_ids_BS.diff(dim=1) != 1
    document_BS = starts_BS.cumsum(1)
    may_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    if causal:
        may_BSS = may_BSS.tril()
    if model.config._attn_implementation != "eager":  # noqa: SLF001 -- transformers has no other name for it
        return may_BSS[:, None]
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(may_BSS, dtype=model.dtype).masked_fill(~may_BSS, lowest)[:, None]


def _give_mask(block: nn.Module, mask: Tensor, position_ids_BS: Tensor) -> torch.utils.hooks.RemovableHandle:
    def before(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        alibi = kwargs["alibi"]  # [B*H, 1, S]: the slope of a head times the position.
        n_heads = alibi.shape[0] // position_ids_BS.shape[0]
        positions = position_ids_BS.repeat_interleave(n_heads, 0)[:, None]
        return args, {**kwargs, "attention_mask": mask, "alibi": alibi.gather(2, positions)}

    return block.register_forward_pre_hook(before, with_kwargs=True)
