"""Binds hookpoints to the modules of a loaded model, and checks that the values fit the names.

`hook_attn_out` and `hook_mlp_out` are the values added to the residual stream: `resid_pre + attn_out + mlp_out ==
resid_post` in every block. `check_identity` tries it once after loading, so that a model which only looks like a known
family (norms behind the sublayers, scaled residuals) is refused instead of giving near misses. In an architecture that
the catalogue does not know, `structure.py` looks for modules for which it holds.
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
from headrace_extractor.hookpoints.catalogue import Catalogue, Hookpoint
from headrace_extractor.hookpoints.names import BLOCK_SITE, split_path
from headrace_extractor.hookpoints.places import Copied
from headrace_extractor.runner.hooks.capture import Site, capture
from headrace_extractor.runner.hooks.isolation import isolated_by
from headrace_extractor.runner.hooks.structure import Found, search, trial_ids
from headrace_extractor.runner.hooks.takes import function_of
from headrace_models.config import Network
from headrace_models.unsupported import why_unsupported

# Two lengths: with one, a dimension could have that size by chance, and not because it counts tokens.
_TRIAL_LENGTHS = (5, 7)
_N_TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """The parts of a loaded model: its hookpoints by name, its blocks, and how it keeps documents apart."""

    catalogue: Catalogue
    points: Mapping[str, Hookpoint]
    blocks: nn.ModuleList
    isolation: str
    causal: bool
    takes_positions: bool = True

    @property
    def rotation_limits(self) -> tuple[int, ...]:
        """Lengths beyond which a pass rotates all its tokens by other angles, also the first ones."""
        return self.catalogue.network.rotation_limits


_ANATOMIES: WeakKeyDictionary[PreTrainedModel, Anatomy] = WeakKeyDictionary()


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Returns the anatomy of a model, studied once. Raises ModelUnsupported if nothing can be captured."""
    known = _ANATOMIES.get(model)
    if known is not None:
        return known
    config = {**model.config.to_dict(), "model_type": model.config.model_type}
    if why := why_unsupported(config):
        raise _unsupported(model, why)
    catalogue = Catalogue(Network.of_config(config))
    family = catalogue.family
    if family is None:
        found = search(model, catalogue.network)
        if isinstance(found, str):
            raise _unsupported(model, found)
        anatomy = _of_found(catalogue, found)
    else:
        points = {point.name: point for point in catalogue.offered}
        if all(point.unavailable for point in points.values()):
            raise _unsupported(model, next((point.unavailable for point in points.values()), ""))
        blocks = _submodule(model, family.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise _unsupported(model, "its hookpoints are not known and could not be found")
        anatomy = Anatomy(
            catalogue=catalogue, points=points, blocks=blocks, isolation=family.isolation, causal=family.causal
        )
    _ANATOMIES[model] = anatomy
    return anatomy


def offered_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Lists the hookpoints of a base model that can be captured, in forward order; raises ModelUnsupported if none."""
    points = anatomy_of(model).points.values()
    return tuple(_site(model, point) for point in points if not point.unavailable)


def n_layers_of(model: PreTrainedModel) -> int:
    """Returns the number of blocks."""
    return len(anatomy_of(model).blocks)


def bind(model: PreTrainedModel, wanted: Sequence[str]) -> tuple[Site, ...]:
    """Binds hookpoints and module paths to modules of the model; `wanted` are full names, without wildcards.

    Raises HookpointNotFound with the nearest names, or with the reason why a hookpoint can't be captured, and
    ModelUnsupported for a module with tensors that are no rows.
    """
    anatomy = anatomy_of(model)
    sites = []
    for name in wanted:
        point = anatomy.points.get(name)
        if point is None or point.unavailable:
            path, side = split_path(name) or ("", "")
            if path and _submodule(model, path) is not None:
                point = Hookpoint(name=name, shape=(), module=f"{path}:{side}", take=Copied())
            else:
                point = anatomy.catalogue.named(name, point)
        sites.append(_site(model, point))
    # Any value may pass a module: only tensors with a row for each token, in order, are rows.
    paths = [site for site in sites if split_path(site.name)]
    for length in _TRIAL_LENGTHS if paths else ():
        for name, values in run_through(model, paths, length).items():
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
    return tuple(sites)


def documents_isolated(model: PreTrainedModel, position_ids: Tensor) -> AbstractContextManager[dict[str, Any]]:
    """Keeps documents in a pass apart by the model's own way; the context yields the arguments of the pass."""
    anatomy = anatomy_of(model)
    return isolated_by(
        anatomy.isolation,
        model,
        position_ids,
        causal=anatomy.causal,
        blocks=anatomy.blocks,
        takes_positions=anatomy.takes_positions,
    )


def check_identity(model: PreTrainedModel) -> None:
    """Runs a few tokens through the model; raises ModelUnsupported if a hookpoint's values contradict its name."""
    anatomy = anatomy_of(model)
    captured = run_through(model, offered_sites(model), _N_TOKENS)
    for name, values in captured.items():
        width, expected = values.numel() // _N_TOKENS, anatomy.points[name].width
        if width != expected:
            raise ModelUnsupported(
                f"{name} is {expected} wide by the model's config.json and {width} in the model; its config and "
                "its code do not fit together.",
                metadata={"hookpoint": name},
            )
    left_before: Tensor | None = None
    for layer in range(len(anatomy.blocks)):
        resid_pre, attn_out, resid_mid, mlp_out, resid_post = (
            captured.get(f"blocks.{layer}.hook_{site}")
            for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        if resid_pre is not None and attn_out is not None and resid_post is not None:
            if resid_mid is not None:
                _check_sum(layer, [resid_pre, attn_out], resid_mid)
            if mlp_out is not None:
                _check_sum(layer, [resid_pre, attn_out, mlp_out], resid_post)
        if (
            left_before is not None
            and resid_pre is not None
            and not torch.equal(left_before.nan_to_num(), resid_pre.nan_to_num())
        ):
            raise ModelUnsupported(
                f"What enters block {layer} is not what leaves the block before it; use a model of another "
                "architecture.",
                metadata={"layer": str(layer)},
            )
        left_before = resid_post


def run_through(model: PreTrainedModel, sites: Sequence[Site], n_tokens: int) -> dict[str, Tensor]:
    """Runs a few tokens through a model; returns the captured tensors by site."""
    with torch.inference_mode(), capture(sites) as captured:
        model(input_ids=trial_ids(model, n_tokens), use_cache=False)
    return captured


def _of_found(catalogue: Catalogue, found: Found) -> Anatomy:
    """Replaces the modules that the catalogue reads off the config by modules that were proven."""
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


def _check_sum(layer: int, parts: Sequence[Tensor], whole: Tensor) -> None:
    flat = [part.float().reshape(_N_TOKENS, -1) for part in (*parts, whole)]
    difference = (sum(flat[:-1]) - flat[-1]).abs()
    # The model rounds after each of two additions; a norm or a scale in between is off by far more than that.
    allowed = 4 * torch.finfo(whole.dtype).eps * sum(part.abs() for part in flat[:-1])
    # Broken weights give NaN here, which compares as false: an extraction finds and reports them.
    if bool((difference > allowed).any()):
        raise ModelUnsupported(
            f"In block {layer} attention and MLP outputs do not add up to the residual stream, so the hookpoints would "
            "not be what their names say; use a model of another architecture.",
            metadata={"layer": str(layer), "largest_difference": f"{difference.max().item():.3g}"},
        )


def _unsupported(model: PreTrainedModel, why: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"{type(model).__name__} can't be captured: {why}. Use another model.",
        metadata={"architecture": type(model).__name__},
    )
