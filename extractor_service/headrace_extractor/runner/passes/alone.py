"""The rows of one document as plain transformers computes them: no packing, no masks, no position ids."""

# ruff: noqa: N803 -- capital suffixes are shapes
# S tokens of a document · D model width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace_extractor.hookpoints.names import BLOCK_SITE
from headrace_extractor.runner.hooks.binding import anatomy_of
from headrace_extractor.runner.hooks.capture import Site, capture


@torch.inference_mode()
def rows_alone(model: PreTrainedModel, token_ids_S: np.ndarray, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Computes one document with plain transformers: `[S, D]` a site."""
    input_ids = torch.from_numpy(token_ids_S.astype(np.int64))[None].to(model.device)
    place_of = {}  # In the residual stream: 0 enters the first block, 1 leaves it.
    for site in sites:
        match = BLOCK_SITE.fullmatch(site.name)
        offset = {"hook_resid_pre": 0, "hook_resid_post": 1}.get(match[2]) if match else None
        if match and offset is not None:
            place_of[site.name] = int(match[1]) + offset
    stream = _hidden_states(model, input_ids) if place_of else {}
    rows = {name: stream[place].flatten(0, 1) for name, place in place_of.items() if place in stream}
    hooked = [site for site in sites if site.name not in rows]
    if hooked:
        with capture(hooked) as captured:
            model(input_ids=input_ids, use_cache=False)
        rows |= {name: acts.reshape(len(token_ids_S), -1) for name, acts in captured.items()}
    return rows


def _hidden_states(model: PreTrainedModel, input_ids: Tensor) -> dict[int, Tensor]:
    """Returns transformers' own `hidden_states` by place in the residual stream; 0 enters the first block.

    Most models list what enters each block, some what leaves it; the last entry is behind the final norm. Models whose
    list is neither give nothing.
    """
    blocks = anatomy_of(model).blocks
    seen: list[Any] = []

    def see(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        seen.append(next((value for value in given if isinstance(value, Tensor)), None))
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[0].register_forward_hook(see, with_kwargs=True)
    try:
        output: Any = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    finally:
        handle.remove()
    states = getattr(output, "hidden_states", None)
    if states is None or len(states) != len(blocks) + 1:
        return {}
    for first, value in enumerate(seen):
        if (
            isinstance(value, Tensor)
            and value.shape == states[0].shape
            and torch.equal(value.nan_to_num(), states[0].nan_to_num())
        ):
            return {first + entry: state for entry, state in enumerate(states[:-1])}
    return {}
