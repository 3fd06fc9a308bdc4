"""Finds hookpoints in a loaded model, and checks that they are what their names say.

`hook_attn_out` and `hook_mlp_out` are what is added to the residual stream: `resid_pre + attn_out + mlp_out ==
resid_post` in every block. `check_identity` tries it once after loading, so that a model which only looks like a known
family (norms behind the sublayers, scaled residuals) is refused instead of giving near misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from extractor_service import hookpoints as names
from extractor_service.errors import ModelUnsupported
from extractor_service.runner.capture import Site, capture


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where a kind of base model keeps its blocks, and each block its two sublayers."""

    blocks: str
    attention: str
    mlp: str


FAMILIES = (
    Family(blocks="layers", attention="self_attn", mlp="mlp"),  # Llama and all that are shaped like it
    Family(blocks="h", attention="attn", mlp="mlp"),  # GPT-2
)


def offered_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Lists the hookpoints of a base model that can be captured, in forward order; raises ModelUnsupported if none."""
    family = _family_of(model)
    blocks = getattr(model, family.blocks)
    offered = [point.name for point in _named(model, len(blocks)) if not point.unavailable]
    if not offered:
        raise _unsupported(model)
    return tuple(_site(name, blocks, family) for name in offered)


def resolve(model: PreTrainedModel, wanted: Sequence[str]) -> tuple[Site, ...]:
    """Finds the wanted hookpoints, in forward order; raises HookpointNotFound with the nearest names."""
    family = _family_of(model)
    blocks = getattr(model, family.blocks)
    return tuple(_site(name, blocks, family) for name in names.check(wanted, _named(model, len(blocks))))


def check_identity(model: PreTrainedModel) -> None:
    """Runs two tokens through the model; raises ModelUnsupported where its hookpoints are not what their names say."""
    sites = offered_sites(model)
    token_ids = torch.tensor([[0, 1]], device=model.device)
    with torch.inference_mode(), capture(sites) as captured:
        model(input_ids=token_ids, use_cache=False)
    before: torch.Tensor | None = None
    for layer in range(1 + names.depth(sites[-1].name)):
        block = [captured.get(f"blocks.{layer}.{site}") for site in names.SITES]
        _check_block(layer, *block)
        _check_same(layer, before, block[0])
        before = block[-1]


def _check_block(
    layer: int,
    resid_pre: torch.Tensor | None,
    attn_out: torch.Tensor | None,
    mlp_out: torch.Tensor | None,
    resid_post: torch.Tensor | None,
) -> None:
    if resid_pre is None or attn_out is None or mlp_out is None or resid_post is None:
        return
    parts = [part.float() for part in (resid_pre, attn_out, mlp_out)]
    difference = (parts[0] + parts[1] + parts[2] - resid_post.float()).abs()
    # The model rounds after each of two additions; a norm or a scale in between is off by far more than that.
    allowed = 4 * torch.finfo(resid_post.dtype).eps * sum(part.abs() for part in parts)
    # Broken weights give NaN here, which compares as false: they are found, and reported as such, while extracting.
    if bool((difference > allowed).any()):
        raise ModelUnsupported(
            f"In block {layer} attention and MLP outputs do not add up to the residual stream, so the hookpoints would "
            "not be what their names say; use a model of another architecture.",
            metadata={"layer": str(layer), "largest_difference": f"{difference.max().item():.3g}"},
        )


def _check_same(layer: int, resid_post: torch.Tensor | None, resid_pre: torch.Tensor | None) -> None:
    """What leaves a block is what enters the next."""
    if (
        resid_post is not None
        and resid_pre is not None
        and not torch.equal(resid_post.nan_to_num(), resid_pre.nan_to_num())
    ):
        raise ModelUnsupported(
            f"What enters block {layer} is not what leaves the block before it; use a model of another architecture.",
            metadata={"layer": str(layer)},
        )


def _named(model: PreTrainedModel, n_layers: int) -> tuple[names.Hookpoint, ...]:
    return names.available(model.config.model_type, n_layers, model.config.hidden_size)


def _site(name: str, blocks: nn.ModuleList, family: Family) -> Site:
    layer, site = names.parse(name)
    block = blocks[layer]
    part = {"hook_attn_out": family.attention, "hook_mlp_out": family.mlp}.get(site)
    module = block if part is None else getattr(block, part)
    return Site(name=name, module=module, is_input=site == "hook_resid_pre")


def _family_of(model: PreTrainedModel) -> Family:
    for family in FAMILIES:
        blocks = getattr(model, family.blocks, None)
        if isinstance(blocks, nn.ModuleList) and all(
            hasattr(block, family.attention) and hasattr(block, family.mlp) for block in blocks
        ):
            return family
    raise _unsupported(model)


def _unsupported(model: PreTrainedModel) -> ModelUnsupported:
    return ModelUnsupported(
        f"{type(model).__name__} is not one of the architectures whose hookpoints are known; use another model.",
        metadata={"architecture": type(model).__name__},
    )
