"""Finds hookpoints in a loaded model, and checks that they are what their names say.

`hook_attn_out` and `hook_mlp_out` are what is added to the residual stream: `resid_pre + attn_out + mlp_out ==
resid_post` in every block. `check_identity` tries it once after loading, so that a model which only looks like a known
family (norms behind the sublayers, scaled residuals) is refused instead of giving near misses. An architecture that is
not known is searched for what holds (`structure.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace_extractor.errors import ModelUnsupported
from headrace_extractor.hookpoints.catalogue import SITES, Catalogue, Hookpoint
from headrace_extractor.hookpoints.names import BLOCK_SITE, split_path
from headrace_extractor.hookpoints.places import Copied
from headrace_extractor.runner.hooks.capture import Site, capture
from headrace_extractor.runner.hooks.isolation import isolated
from headrace_extractor.runner.hooks.structure import Found, search
from headrace_extractor.runner.hooks.takes import function_of
from headrace_models.config import Network

# Two lengths, so that a dimension of another size by chance is not taken for that of tokens.
_TRIAL_LENGTHS = (5, 7)
_N_TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What is known of a loaded model: its hookpoints by name, its blocks, and how it keeps documents apart."""

    catalogue: Catalogue
    points: Mapping[str, Hookpoint]
    blocks: nn.ModuleList
    isolation: str
    causal: bool
    takes_positions: bool = True

    @property
    def rotation_limits(self) -> tuple[int, ...]:
        """Longer passes rotate all their tokens by other angles, those in front too."""
        return self.catalogue.network.rotation_limits


_ANATOMIES: WeakKeyDictionary[PreTrainedModel, Anatomy] = WeakKeyDictionary()


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Returns what is known of a model, found out once. Raises ModelUnsupported if nothing can be captured."""
    known = _ANATOMIES.get(model)
    if known is None:
        known = _ANATOMIES[model] = _study(model)
    return known


def offered_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Lists the hookpoints of a base model that can be captured, in forward order; raises ModelUnsupported if none."""
    points = anatomy_of(model).points.values()
    return tuple(_site(model, point) for point in points if not point.unavailable)


def n_layers_of(model: PreTrainedModel) -> int:
    """Returns the number of blocks."""
    return len(anatomy_of(model).blocks)


def resolve(model: PreTrainedModel, wanted: Sequence[str]) -> tuple[Site, ...]:
    """Finds the wanted hookpoints, which have their own names by now.

    Raises HookpointNotFound with the nearest names, or with why one can't be captured.
    """
    anatomy = anatomy_of(model)
    sites = []
    for name in wanted:
        point = anatomy.points.get(name)
        if point is None or point.unavailable:
            point = _by_path(model, name) or anatomy.catalogue.named(name, point)
        sites.append(_site(model, point))
    _check_tokens(model, [site for site in sites if split_path(site.name)])
    return tuple(sites)


def isolation(model: PreTrainedModel, position_ids: Tensor) -> AbstractContextManager[dict[str, Any]]:
    """Keeps documents in a pass over these position ids apart; the context yields arguments for the model."""
    anatomy = anatomy_of(model)
    return isolated(
        model,
        position_ids,
        how=anatomy.isolation,
        causal=anatomy.causal,
        blocks=anatomy.blocks,
        takes_positions=anatomy.takes_positions,
    )


def check_identity(model: PreTrainedModel) -> None:
    """Runs a few tokens through the model; raises ModelUnsupported where a hookpoint is not what its name says."""
    anatomy = anatomy_of(model)
    captured = run_through(model, offered_sites(model), _N_TOKENS)
    for name, values in captured.items():
        _check_shape(anatomy.points[name], values)
    before: Tensor | None = None
    for layer in range(len(anatomy.blocks)):
        block = {site: captured.get(f"blocks.{layer}.{site}") for site in SITES}
        _check_block(layer, block)
        _check_same(layer, before, block["hook_resid_pre"])
        before = block["hook_resid_post"]


def run_through(model: PreTrainedModel, sites: Sequence[Site], n_tokens: int) -> dict[str, Tensor]:
    """Runs the first token ids through a model; returns what the sites captured."""
    token_ids = torch.arange(n_tokens, device=model.device)[None]
    with torch.inference_mode(), capture(sites) as captured:
        model(input_ids=token_ids, use_cache=False)
    return captured


def _study(model: PreTrainedModel) -> Anatomy:
    catalogue = Catalogue(Network.of_config({**model.config.to_dict(), "model_type": model.config.model_type}))
    points = {point.name: point for point in catalogue.offered}
    family = catalogue.family
    if family is None:
        found = search(model, catalogue.network)
        if isinstance(found, str):
            raise _unsupported(model, found)
        return _of_found(catalogue, found)
    if all(point.unavailable for point in points.values()):
        raise _unsupported(model, next((point.unavailable for point in points.values()), ""))
    blocks = _submodule(model, family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise _unsupported(model)
    return Anatomy(catalogue=catalogue, points=points, blocks=blocks, isolation=family.isolation, causal=family.causal)


def _of_found(catalogue: Catalogue, found: Found) -> Anatomy:
    """Puts what a search has proven in place of what the config alone promises."""
    points = {}
    for point in catalogue.offered:
        match = BLOCK_SITE.fullmatch(point.name)
        if match and not point.unavailable:
            layer, site = int(match[1]), match[2]
            module = found.module_of(layer, site)
            why = "" if module else found.why_not(site)
            # Whether the network changes this tensor in place is not known either.
            points[point.name] = replace(point, module=module, take=Copied(), unavailable=why)
        else:
            points[point.name] = point
    return Anatomy(
        catalogue=catalogue,
        points=points,
        blocks=found.blocks,
        isolation=found.isolation,
        causal=found.causal,
        takes_positions=found.takes_positions,
    )


def _by_path(model: PreTrainedModel, name: str) -> Hookpoint | None:
    path, side = split_path(name) or ("", "")
    if not path or _submodule(model, path) is None:
        return None
    return Hookpoint(name=name, shape=(), module=f"{path}:{side}", take=Copied())


def _site(model: PreTrainedModel, point: Hookpoint) -> Site:
    path, side = split_path(point.module) or ("", "")
    module = _submodule(model, path)
    if module is None:
        raise _unsupported(model, f"it has no module {path!r}, where {point.name} is taken")
    return Site(name=point.name, module=module, is_input=side == "in", take=function_of(point.take, module))


def _submodule(model: PreTrainedModel, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _check_tokens(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Anything may pass a module: only tensors that have a row for each token, in order, are rows."""
    for length in _TRIAL_LENGTHS if sites else ():
        for name, values in run_through(model, sites, length).items():
            if (
                values.dim() < 2
                or values.shape[0] not in (1, length)
                or (values.shape[0] == 1 and values.shape[1] != length)
            ):
                raise ModelUnsupported(
                    f"What passes {name} has the shape {list(values.shape)} for {length} tokens, which is no row for "
                    "each of them; name another module.",
                    metadata={"hookpoint": name},
                )


def _check_shape(point: Hookpoint, values: Tensor) -> None:
    width = values.numel() // _N_TOKENS
    if width != point.width:
        raise ModelUnsupported(
            f"{point.name} is {point.width} wide by the model's config.json and {width} in the model; its config and "
            "its code do not fit together.",
            metadata={"hookpoint": point.name},
        )


def _check_block(layer: int, block: Mapping[str, Tensor | None]) -> None:
    resid_pre, attn_out, mlp_out = (block[site] for site in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
    resid_mid, resid_post = block["hook_resid_mid"], block["hook_resid_post"]
    if resid_pre is None or resid_post is None or attn_out is None:
        return
    if resid_mid is not None:
        _check_sum(layer, [resid_pre, attn_out], resid_mid)
    if mlp_out is not None:
        _check_sum(layer, [resid_pre, attn_out, mlp_out], resid_post)


def _check_sum(layer: int, parts: Sequence[Tensor], whole: Tensor) -> None:
    flat = [part.float().reshape(_N_TOKENS, -1) for part in (*parts, whole)]
    difference = (sum(flat[:-1]) - flat[-1]).abs()
    # The model rounds after each of two additions; a norm or a scale in between is off by far more than that.
    allowed = 4 * torch.finfo(whole.dtype).eps * sum(part.abs() for part in flat[:-1])
    # Broken weights give NaN here, which compares as false: they are found, and reported as such, while extracting.
    if bool((difference > allowed).any()):
        raise ModelUnsupported(
            f"In block {layer} attention and MLP outputs do not add up to the residual stream, so the hookpoints would "
            "not be what their names say; use a model of another architecture.",
            metadata={"layer": str(layer), "largest_difference": f"{difference.max().item():.3g}"},
        )


def _check_same(layer: int, resid_post: Tensor | None, resid_pre: Tensor | None) -> None:
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


def _unsupported(
    model: PreTrainedModel, why: str = "its hookpoints are not known and could not be found"
) -> ModelUnsupported:
    return ModelUnsupported(
        f"{type(model).__name__} can't be captured: {why}. Use another model.",
        metadata={"architecture": type(model).__name__},
    )
