"""Finds the hookpoints of a decoder that the catalogue does not know, by its structure, and keeps only proven ones.

A few tokens run through the model, and the inputs and outputs of every module below its blocks are compared.
`hook_attn_out` and `hook_mlp_out` are a pair of outputs, one of the attention or behind it, one of the MLP or behind
it, that add up with the block's input to its output in every block. `hook_resid_mid` is an input that equals the sum of
the block's input and the first of the pair. `attn.hook_z` and `mlp.hook_post` are the inputs of the projections that
give the output of attention and MLP. Two documents, in one sequence and each alone, tell how the model keeps documents
apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headrace_extractor.hookpoints.places import BY_MASK, BY_POSITIONS, NOT_AT_ALL
from headrace_extractor.runner.hooks.isolation import isolated_by
from headrace_models.config import Network

_N_TOKENS = 6
# One of these is in the name of a block's child that is its attention or its MLP.
_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "ff", "moe", "experts", "fc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The proven structure of a model; `places` are `<module path below a block>:in` or `:out` by site."""

    path: str
    blocks: nn.ModuleList
    places: dict[str, str]
    isolation: str
    causal: bool
    takes_positions: bool

    def module_of(self, layer: int, site: str) -> str:
        """Returns the place of a site in the model, `<path>:in` or `:out`; empty if none was proven."""
        below = self.places.get(site)
        if below is None:
            return ""
        path, _, side = below.partition(":")
        return ".".join(filter(None, (self.path, str(layer), path))) + f":{side}"

    def why_not(self, site: str) -> str:
        """Returns why a site has no place."""
        part = "attention" if site in ("hook_attn_out", "attn.hook_z") else "MLP"
        if site == "hook_resid_mid":
            return "no module of its blocks was found that takes the residual stream between attention and MLP"
        if site in ("attn.hook_z", "mlp.hook_post"):
            return f"no single projection was found that gives the output of its {part}"
        return f"no output of its {part} was found that adds up with the residual stream in every block"


@dataclass(slots=True)
class _Passed:
    """Inputs and outputs of the modules below a block in one pass, by path, in the order in which the modules ended."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)

    def enter(self, path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps a module's input: its first tensor."""
        values = (*args, kwargs.get("hidden_states"), *kwargs.values())
        value = next((value for value in values if isinstance(value, Tensor)), None)
        if value is not None:
            if path in self.inputs:
                self.twice.add(path)
            self.inputs[path] = value.clone()

    def leave(self, path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        """Keeps a module's output: the tensor, or the first of a tuple."""
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, Tensor):
            self.outputs[path] = value.clone()


def search(model: PreTrainedModel, network: Network) -> Found | str:
    """Returns the structure that can be proven, or the reason why not even the residual stream can be taken."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = [(name, module) for name, module in lists if network.n_layers and len(module) == network.n_layers]
    if not candidates:
        return f"no list of {network.n_layers} blocks could be found in it"
    token_ids = torch.arange(_N_TOKENS, device=model.device)[None]
    for path, blocks in sorted(candidates, key=lambda pair: pair[0].count(".")):  # The outermost first.
        with torch.inference_mode(), _watched(blocks) as passed:
            model(input_ids=token_ids, use_cache=False)
        for seen in passed:
            for twice in seen.twice:  # A module that was passed twice has no one value.
                del seen.inputs[twice]
                seen.outputs.pop(twice, None)
        if all("" in seen.inputs and "" in seen.outputs for seen in passed) and all(
            torch.equal(one.outputs[""], other.inputs[""]) for one, other in pairwise(passed)
        ):
            return _prove(model, network, path, blocks, passed)
    return "what leaves one of its blocks is not what enters the next"


def _prove(
    model: PreTrainedModel, network: Network, path: str, blocks: nn.ModuleList, passed: Sequence[_Passed]
) -> Found | str:
    """Returns the structure of blocks that pass on a residual stream, or the reason why they can't be used."""
    token_ids = torch.arange(_N_TOKENS, device=model.device)[None]
    last = partial(_last, model, blocks, causal=True)
    plain = last(token_ids, None, BY_POSITIONS)
    try:
        numbered = last(token_ids, token_ids, BY_POSITIONS)
    except TypeError:  # Its code has no such argument.
        numbered = None
    if numbered is not None and not torch.equal(numbered.nan_to_num(), plain.nan_to_num()):
        return "it does not number positions from 0"
    other_ids = token_ids.clone()
    other_ids[0, -1] = 0
    change = plain - last(other_ids, None, BY_POSITIONS)
    # A later token changes nothing before it.
    causal = not network.looks_ahead and _is_nothing(change[:, :-1], beside=change[:, -1:])
    # A mask that is passed would replace the windows of layers that look back only so far.
    config = model.config.get_text_config().to_dict()
    has_window = any(value and ("window" in key or "chunk" in key) for key, value in config.items())
    ways = [] if numbered is None else [BY_POSITIONS] if has_window else [BY_POSITIONS, BY_MASK]
    stream = {"hook_resid_pre": ":in", "hook_resid_post": ":out"}
    return Found(
        path=path,
        blocks=blocks,
        places=stream | _sublayers(passed) | _projections(passed, network),
        isolation=next((how for how in ways if _isolates(model, blocks, how, causal)), NOT_AT_ALL),
        causal=causal,
        takes_positions=numbered is not None,
    )


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[list[_Passed]]:
    """Yields the inputs and outputs of each block's modules during a pass in the block."""
    passed = [_Passed() for _ in blocks]
    handles = []
    for block, seen in zip(blocks, passed, strict=True):
        for path, module in block.named_modules():
            handles.append(module.register_forward_pre_hook(partial(seen.enter, path), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(seen.leave, path)))
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _sublayers(passed: Sequence[_Passed]) -> dict[str, str]:
    """Finds two outputs that add up with the residual stream in every block, and an input that is the first sum."""
    first_block = passed[0]
    paths = [path for path in first_block.outputs if path]
    attention = [path for path in paths if _is_part(path, _ATTENTION)]
    mlp = [path for path in paths if _is_part(path, _MLP) and path not in attention]
    if not attention or not mlp:
        return {}
    # A norm or a scale behind attention or MLP may give the value that is added. Outermost modules are tried first, and
    # of modules at one depth the last.
    between = paths[paths.index(attention[-1]) + 1 : paths.index(mlp[0])]
    behind = paths[paths.index(mlp[-1]) + 1 :]

    def outermost(path: str) -> tuple[int, int]:
        return path.count("."), -paths.index(path)

    firsts = sorted({*attention, *between}, key=outermost)
    seconds = sorted({*mlp, *behind} - {*firsts}, key=outermost)
    for one, other in product(firsts, seconds):
        if not all(
            _same_sum([seen.inputs[""], seen.outputs.get(one), seen.outputs.get(other)], seen.outputs[""])
            for seen in passed
        ):
            continue
        places = {"hook_attn_out": f"{one}:out", "hook_mlp_out": f"{other}:out"}
        for path in first_block.inputs:
            if all(
                path in seen.inputs and _same_sum([seen.inputs[""], seen.outputs[one]], seen.inputs[path])
                for seen in passed
            ):
                return places | {"hook_resid_mid": f"{path}:in"}
        return places
    return {}


def _projections(passed: Sequence[_Passed], network: Network) -> dict[str, str]:
    """Finds the leaf module that gives the output of the attention, and the leaf that gives the output of the MLP."""
    found = {}
    wanted = (("attn.hook_z", _ATTENTION, network.n_heads * network.d_head), ("mlp.hook_post", _MLP, network.d_mlp))
    for site, words, width in wanted:
        parts = [path for path in passed[0].outputs if path and _is_part(path, words)]
        for path in parts:
            if all(_gives(seen, path, parts[-1], width) for seen in passed):
                found[site] = f"{path}:in"
                break
    return found


def _gives(seen: _Passed, path: str, whole: str, width: int) -> bool:
    """True for a leaf module that takes rows of this width and gives the output of `whole`."""
    if path not in seen.inputs or any(other.startswith(f"{path}.") for other in seen.outputs):
        return False
    entering, leaving, result = seen.inputs[path], seen.outputs.get(path), seen.outputs.get(whole)
    if leaving is None or result is None or entering.shape[-1] != width or leaving.numel() != result.numel():
        return False
    # Dropout and the like give back their input.
    is_projection = entering.shape != leaving.shape or not torch.equal(entering, leaving)
    return is_projection and torch.equal(leaving.flatten(), result.flatten())


def _is_part(path: str, words: Sequence[str]) -> bool:
    """True if the block's own child on this path has one of the words in its name, and is no norm."""
    child = path.split(".", maxsplit=1)[0].lower()
    return "norm" not in child and "ln" not in child and any(word in child for word in words)


def _same_sum(parts: Sequence[Tensor | None], whole: Tensor) -> bool:
    flat = [part.float().flatten() for part in parts if part is not None and part.numel() == whole.numel()]
    if len(flat) != len(parts):
        return False
    difference = (torch.stack(flat).sum(0) - whole.float().flatten()).abs()
    # The model rounds after each addition.
    allowed = 4 * torch.finfo(whole.dtype).eps * torch.stack(flat).abs().sum(0)
    return bool((difference <= allowed).all())


def _isolates(model: PreTrainedModel, blocks: nn.ModuleList, how: str, causal: bool) -> bool:
    """True if two documents in a sequence give what each gives alone; they don't if they see one another."""
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
    """Returns the output of the last block; `positions` None: the model numbers them itself."""
    where = ids if positions is None else positions
    with (
        torch.inference_mode(),
        _watched([blocks[-1]]) as passed,
        isolated_by(how, model, where, causal=causal, blocks=blocks) as arguments,
    ):
        model(input_ids=ids, use_cache=False, **({} if positions is None else arguments))
    return passed[0].outputs[""]


def _is_nothing(difference: Tensor, *, beside: Tensor) -> bool:
    """True if it is far below the change that another token or document makes, as rounding is, also in 16 bits."""
    return bool(difference.float().norm() <= 0.05 * beside.float().norm())
