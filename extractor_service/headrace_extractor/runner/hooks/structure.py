"""Finds the hookpoints of a decoder that is not known, by its structure, and takes only what it can prove.

A few tokens run through the model, and what passes every module below its blocks is looked at. `hook_attn_out` and
`hook_mlp_out` are a pair of outputs, one of the attention or behind it, one of the MLP or behind it, that add up with
the block's input to its output in every block; `hook_resid_mid` is an input that is the sum of the first two.
`attn.hook_z` and `mlp.hook_post` are what enters the projection that gives the output of attention and MLP. Two
documents in one sequence, and each alone, tell how the model keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace_extractor.hookpoints.places import BY_MASK, BY_POSITIONS, NOT_AT_ALL
from headrace_extractor.runner.hooks.isolation import isolated
from headrace_models.config import Network

_N_TOKENS = 6
_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "ff", "moe", "experts", "fc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was proven: module paths below a block by site, and how documents are kept apart."""

    path: str
    blocks: nn.ModuleList
    places: dict[str, str]
    isolation: str
    causal: bool
    takes_positions: bool

    def module_of(self, layer: int, site: str) -> str:
        """Where a site is, `<path>:in` or `:out`; empty if that could not be proven."""
        below = self.places.get(site)
        if below is None:
            return ""
        path, _, side = below.partition(":")
        return ".".join(filter(None, (self.path, str(layer), path))) + f":{side}"

    def why_not(self, site: str) -> str:
        """Why a site has no place."""
        part = "attention" if site in ("hook_attn_out", "attn.hook_z") else "MLP"
        if site == "hook_resid_mid":
            return "no module of its blocks was found that takes the residual stream between attention and MLP"
        if site in ("attn.hook_z", "mlp.hook_post"):
            return f"no single projection was found that gives the output of its {part}"
        return f"no output of its {part} was found that adds up with the residual stream in every block"


@dataclass(slots=True)
class _Passed:
    """What went into and came out of modules below a block, by path, in the order in which they ended.

    A module that was passed twice is no place.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)

    def forget_twice(self) -> None:
        """Drops what was passed twice."""
        for path in self.twice:
            self.inputs.pop(path, None)
            self.outputs.pop(path, None)


def search(model: PreTrainedModel, network: Network) -> Found | str:
    """Returns what can be proven of a model, or why not even its residual stream can be taken."""
    candidates = _blocks(model, network.n_layers)
    if not candidates:
        return f"no list of {network.n_layers} blocks could be found in it"
    for path, blocks in candidates:
        passed = _pass(model, blocks)
        if _is_stream(passed):
            return _prove(model, network, path, blocks, passed)
    return "what leaves one of its blocks is not what enters the next"


def _pass(model: PreTrainedModel, blocks: nn.ModuleList) -> list[_Passed]:
    token_ids = torch.arange(_N_TOKENS, device=model.device)[None]
    with torch.inference_mode(), _watching(blocks) as passed:
        model(input_ids=token_ids, use_cache=False)
    for seen in passed:
        seen.forget_twice()
    return passed


def _prove(
    model: PreTrainedModel, network: Network, path: str, blocks: nn.ModuleList, passed: Sequence[_Passed]
) -> Found | str:
    takes_positions = _takes_positions(model, blocks)
    if takes_positions and not _counts_from_zero(model, blocks):
        return "it does not number positions from 0"
    places = {"hook_resid_pre": ":in", "hook_resid_post": ":out"} | _sublayers(passed)
    places |= _projections(passed, network)
    causal = not network.looks_ahead and _is_causal(model, blocks)
    ways = [BY_POSITIONS, *([] if _has_window(model) else [BY_MASK])] if takes_positions else []
    isolation = next((how for how in ways if _isolates(model, blocks, how, causal)), NOT_AT_ALL)
    return Found(
        path=path,
        blocks=blocks,
        places=places,
        isolation=isolation,
        causal=causal,
        takes_positions=takes_positions,
    )


def _blocks(model: PreTrainedModel, n_layers: int) -> list[tuple[str, nn.ModuleList]]:
    """Lists of as many modules as the config has layers, the outermost first."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if n_layers and len(module) == n_layers]
    return sorted(fitting, key=lambda pair: pair[0].count("."))


@contextmanager
def _watching(blocks: nn.ModuleList) -> Iterator[list[_Passed]]:
    passed = [_Passed() for _ in blocks]
    handles = []
    for block, seen in zip(blocks, passed, strict=True):
        for path, module in block.named_modules():
            handles += [_watch_input(module, path, seen), _watch_output(module, path, seen)]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _watch_input(module: nn.Module, path: str, seen: _Passed) -> Any:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
            if isinstance(value, Tensor):
                if path in seen.inputs:
                    seen.twice.add(path)
                seen.inputs[path] = value.clone()
                return

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _watch_output(module: nn.Module, path: str, seen: _Passed) -> Any:
    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, Tensor):
            seen.outputs[path] = value.clone()

    return module.register_forward_hook(after)


def _is_stream(passed: Sequence[_Passed]) -> bool:
    """What leaves a block enters the next."""
    if not all("" in seen.inputs and "" in seen.outputs for seen in passed):
        return False
    return all(torch.equal(a.outputs[""], b.inputs[""]) for a, b in pairwise(passed))


def _sublayers(passed: Sequence[_Passed]) -> dict[str, str]:
    """The pair that adds up, and what takes its first sum."""
    for attention, mlp in _pairs(passed[0]):
        if all(_adds_up(seen, attention, mlp) for seen in passed):
            middle = [path for path in passed[0].inputs if all(_is_middle(seen, attention, path) for seen in passed)]
            places = {"hook_attn_out": f"{attention}:out", "hook_mlp_out": f"{mlp}:out"}
            return places | ({"hook_resid_mid": f"{middle[0]}:in"} if middle else {})
    return {}


def _projections(passed: Sequence[_Passed], network: Network) -> dict[str, str]:
    """The leaf inside attention, and inside the MLP, whose output is that of the whole."""
    found = {}
    wanted = (("attn.hook_z", _ATTENTION, network.n_heads * network.d_head), ("mlp.hook_post", _MLP, network.d_mlp))
    for site, words, width in wanted:
        parts = [path for path in passed[0].outputs if path and _is_part(path, words)]
        if parts and (
            paths := [path for path in parts if all(_gives(seen, path, parts[-1], width) for seen in passed)]
        ):
            found[site] = f"{paths[0]}:in"
    return found


def _gives(seen: _Passed, path: str, whole: str, width: int) -> bool:
    """True for a leaf that takes rows of this width and gives what leaves the whole."""
    if path not in seen.inputs or any(other.startswith(f"{path}.") for other in seen.outputs):
        return False
    entering, leaving, result = seen.inputs[path], seen.outputs.get(path), seen.outputs.get(whole)
    if leaving is None or result is None or entering.shape[-1] != width or leaving.numel() != result.numel():
        return False
    is_projection = entering.shape != leaving.shape or not torch.equal(entering, leaving)
    return is_projection and torch.equal(leaving.flatten(), result.flatten())


def _pairs(seen: _Passed) -> Iterator[tuple[str, str]]:
    """Outputs of attention or behind it, each with those of the MLP or behind it; the outermost first."""
    paths = [path for path in seen.outputs if path]
    attention = [path for path in paths if _is_part(path, _ATTENTION)]
    mlp = [path for path in paths if _is_part(path, _MLP) and path not in attention]
    if not attention or not mlp:
        return
    between = paths[paths.index(attention[-1]) + 1 : paths.index(mlp[0])]
    behind = paths[paths.index(mlp[-1]) + 1 :]
    first = sorted({*attention, *between}, key=lambda path: (path.count("."), -paths.index(path)))
    second = sorted({*mlp, *behind} - {*first}, key=lambda path: (path.count("."), -paths.index(path)))
    yield from ((one, other) for one in first for other in second)


def _is_part(path: str, words: Sequence[str]) -> bool:
    """Whether the block's own child on this path is named like one."""
    child = path.split(".", maxsplit=1)[0].lower()
    return "norm" not in child and "ln" not in child and any(word in child for word in words)


def _adds_up(seen: _Passed, attention: str, mlp: str) -> bool:
    parts = [seen.inputs[""], seen.outputs.get(attention), seen.outputs.get(mlp)]
    return _same_sum(parts, seen.outputs[""])


def _is_middle(seen: _Passed, attention: str, path: str) -> bool:
    return path in seen.inputs and _same_sum([seen.inputs[""], seen.outputs[attention]], seen.inputs[path])


def _same_sum(parts: Sequence[Tensor | None], whole: Tensor) -> bool:
    flat = [part.float().flatten() for part in parts if part is not None and part.numel() == whole.numel()]
    if len(flat) != len(parts):
        return False
    difference = (torch.stack(flat).sum(0) - whole.float().flatten()).abs()
    allowed = 4 * torch.finfo(whole.dtype).eps * torch.stack(flat).abs().sum(0)
    return bool((difference <= allowed).all())


def _takes_positions(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether its code can be told the positions of tokens."""
    ids = torch.arange(_N_TOKENS, device=model.device)[None]
    try:
        _last(model, blocks, ids, ids, BY_POSITIONS, causal=True)
    except TypeError:
        return False
    return True


def _counts_from_zero(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Positions from 0 on are what the model takes where none are given."""
    ids = torch.arange(_N_TOKENS, device=model.device)[None]
    given, own = (_last(model, blocks, ids, positions, BY_POSITIONS, causal=True) for positions in (ids, None))
    return torch.equal(given.nan_to_num(), own.nan_to_num())


def _has_window(model: PreTrainedModel) -> bool:
    """Whether some of its layers look back only so far: a mask that is passed would take the place of theirs."""
    config = model.config.get_text_config().to_dict()
    return any(value and ("window" in key or "chunk" in key) for key, value in config.items())


def _is_causal(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """A later token changes nothing before it."""
    ids = torch.arange(_N_TOKENS, device=model.device)[None]
    other = ids.clone()
    other[0, -1] = 0
    one, two = (_last(model, blocks, each, None, BY_POSITIONS, causal=True) for each in (ids, other))
    return _is_nothing((one - two)[:, :-1], beside=(one - two)[:, -1:])


def _isolates(model: PreTrainedModel, blocks: nn.ModuleList, how: str, causal: bool) -> bool:
    """Two documents in a sequence give what each gives alone, which they don't if they see one another."""
    half = _N_TOKENS // 2
    ids = torch.arange(_N_TOKENS, device=model.device)[None]
    positions = torch.arange(half, device=model.device).repeat(2)[None]
    try:
        together = _last(model, blocks, ids, positions, how, causal=causal)
        alone = [_last(model, blocks, part, positions[:, :half], how, causal=causal) for part in ids.split(half, 1)]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # Its code does not take the arguments.
    joined = _last(model, blocks, ids, None, how, causal=causal)
    apart = torch.cat(alone, 1)
    return _is_nothing(together - apart, beside=joined - apart)


def _last(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, positions: Tensor | None, how: str, *, causal: bool
) -> Tensor:
    """What leaves the last block."""
    where = ids if positions is None else positions
    with (
        torch.inference_mode(),
        _watching(nn.ModuleList([blocks[-1]])) as passed,
        isolated(model, where, how=how, causal=causal, blocks=blocks) as arguments,
    ):
        model(input_ids=ids, use_cache=False, **({} if positions is None else arguments))
    return passed[0].outputs[""]


def _is_nothing(difference: Tensor, *, beside: Tensor) -> bool:
    """Far below what another token or document does; rounding alone is, also in 16 bits."""
    return bool(difference.float().norm() <= 0.05 * beside.float().norm())
