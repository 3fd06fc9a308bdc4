"""Keeps documents that share a sequence apart, in the way that the model's code allows.

`position_ids` alone decide: a step other than +1 starts a document. Most models' code builds the mask from them. Other
models are passed a mask, which transformers uses unchanged if it has four dimensions. BLOOM's code accepts none: there
each block is given the mask, and ALiBi that starts anew with each document. If no document starts inside a sequence,
the model's own attention is used.
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
def isolated_by(
    how: str,
    model: PreTrainedModel,
    position_ids_BS: Tensor,
    *,
    causal: bool,
    blocks: nn.ModuleList,
    takes_positions: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yields the arguments of a pass that keeps documents apart by `how`.

    Raises FieldInvalid if `how` is no way and documents share a sequence. `binding.documents_isolated` knows a model's
    way.
    """
    arguments = {"position_ids": position_ids_BS} if takes_positions else {}
    # Asks the device only where that matters: positions alone keep most models' documents apart.
    if how == BY_POSITIONS or not bool((position_ids_BS.diff(dim=1) != 1).any()):
        yield arguments
        return
    if how not in (BY_MASK, BY_BLOCK_MASK):
        raise cannot_isolate(model.config.model_type)
    mask = _mask(model, position_ids_BS, causal=causal)
    if how == BY_MASK:
        yield arguments | {"attention_mask": mask}
        return

    def give_mask(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        alibi = kwargs["alibi"]  # [B*H, 1, S]: the slope of a head times the position.
        n_heads = alibi.shape[0] // position_ids_BS.shape[0]
        positions = position_ids_BS.repeat_interleave(n_heads, 0)[:, None]
        return args, {**kwargs, "attention_mask": mask, "alibi": alibi.gather(2, positions)}

    handles = [block.register_forward_pre_hook(give_mask, with_kwargs=True) for block in blocks]
    try:
        yield arguments
    finally:
        for handle in handles:
            handle.remove()


def _mask(model: PreTrainedModel, position_ids_BS: Tensor, *, causal: bool) -> Tensor:
    """Returns `[B, 1, S, S]`: where a token may look, True for SDPA and 0 for eager attention."""
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
