"""Finds the hookpoints of a decoder that the catalogue does not know, by its structure, and keeps only proven ones.

A few tokens run through the model, and the inputs and outputs of every module below its blocks are compared.
`hook_attn_out` and `hook_mlp_out` are a pair of outputs, one of the attention or behind it, one of the MLP or behind
it, that add up with the block's input to its output in every block. `hook_resid_mid` is an input that equals the sum of
the block's input and the first of the pair. `attn.hook_z` and `mlp.hook_post` are the inputs of the linear layers whose
product is the output of attention and MLP. How the model keeps documents apart is tried too (`proof.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headrace_extractor.hookpoints.places import BY_MASK, BY_POSITIONS, NOT_AT_ALL
from headrace_extractor.runner.hooks.isolation import isolated_by
from headrace_extractor.runner.hooks.proof import try_isolation
from headrace_extractor.runner.hooks.rounding import least_beyond_rounding, row_errors
from headrace_models.config import Network

_N_TOKENS = 6
# The largest number of a stream that counts as small: far below what attention and MLP add, far above float16's least.
_SMALL_LOG2 = -6
# For three documents of several tokens each; and of two tokens, for the shortest windows.
_TRIED_LENGTHS = (24, 6)
# One of these is in the name of a block's child that is its attention or its MLP.
_ATTENTION = ("attn", "attention", "mixer")
# The modules whose output is the product of their input with a matrix; quantized ones are among their subclasses.
_LINEAR = (nn.Linear, Conv1D)
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
        """Keeps a module's output: the tensor, or the first of several."""
        value = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(value, Tensor):
            self.outputs[path] = value.clone()


def search(model: PreTrainedModel, network: Network) -> Found | str:
    """Returns the structure that can be proven, or the reason why not even the residual stream can be taken."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = [(name, module) for name, module in lists if len(module) == network.n_layers]
    if not network.n_layers:
        return "its config.json does not tell how many blocks it has"
    if not candidates:
        return f"no list of {network.n_layers} blocks could be found in it"
    token_ids = trial_ids(model, _N_TOKENS)
    for path, blocks in sorted(candidates, key=lambda pair: pair[0].count(".")):  # The outermost first.
        try:
            with torch.inference_mode(), _watched(blocks) as passed:
                model(input_ids=token_ids, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:  # noqa: BLE001 -- the code of any architecture, which may need other arguments
            return f"its code does not run on token ids alone ({type(exc).__name__}: {str(exc)[:200]})"
        for seen in passed:
            for twice in seen.twice:  # A module that was passed twice has no one value.
                del seen.inputs[twice]
                seen.outputs.pop(twice, None)
        if all("" in seen.inputs and "" in seen.outputs for seen in passed) and all(
            torch.equal(one.outputs[""], other.inputs[""]) for one, other in pairwise(passed)
        ):
            shape = [*passed[0].inputs[""].shape]
            if shape != [1, _N_TOKENS, network.d_model]:
                return f"its blocks pass on a tensor of {shape} for {_N_TOKENS} tokens: no row for each of them"
            return _prove(model, network, path, blocks, passed)
    return "what leaves one of its blocks is not what enters the next"


def trial_ids(model: PreTrainedModel, n_tokens: int) -> Tensor:
    """Returns the first token ids that are not special, `[1, n_tokens]`: code treats padding and pictures otherwise."""
    config = model.config.get_text_config().to_dict() | model.config.to_dict()
    special = {value for name, value in config.items() if "token_i" in name and isinstance(value, int)}
    plain = [number for number in range(n_tokens + len(special)) if number not in special][:n_tokens]
    return torch.tensor([plain], device=model.device)


def _prove(
    model: PreTrainedModel, network: Network, path: str, blocks: nn.ModuleList, passed: Sequence[_Passed]
) -> Found | str:
    """Returns the structure of blocks that pass on a residual stream, or the reason why they can't be used."""
    token_ids, positions = trial_ids(model, _N_TOKENS), torch.arange(_N_TOKENS, device=model.device)[None]
    plain = _last(model, blocks, token_ids)
    try:
        numbered = _last(model, blocks, token_ids, positions)
    except TypeError:  # Its code has no such argument.
        numbered = None
    if numbered is not None and not torch.equal(numbered.nan_to_num(), plain.nan_to_num()):
        numbered = None  # It does not number positions from 0, as RoBERTa: then its own code has to do so.
    other_ids = token_ids.clone()
    other_ids[0, -1] = token_ids[0, 0]
    other = _last(model, blocks, other_ids)
    # A later token changes nothing before it. Experts see batches of another size, which rounds otherwise.
    changes = row_errors(other[0, :-1].flatten(1), plain[0, :-1].flatten(1))
    causal = not (network.looks_ahead or network.picks_tokens)
    causal = causal and bool((changes <= least_beyond_rounding(model.dtype)).all())
    # Which tokens are the best is decided over the whole sequence: with equal scores a row depends on all others.
    ways = [] if numbered is None or network.picks_tokens else [BY_POSITIONS, BY_MASK]
    # A mask that is passed replaces windows: whether that matters is tried for the length of each recipe.
    lengths = [length for length in _TRIED_LENGTHS if length <= (network.context_window or length)]
    isolation = NOT_AT_ALL
    for length, how in product(lengths, ways):
        apart = partial(isolated_by, how, model, causal=causal, blocks=blocks)
        if try_isolation(model, blocks, apart, length, causal=causal).holds:
            isolation = how
            break
    stream = {"hook_resid_pre": ":in", "hook_resid_post": ":out"}
    return Found(
        path=path,
        blocks=blocks,
        places=stream | _sublayers([*passed, *_passed_small(model, blocks)]) | _projections(blocks, passed, network),
        isolation=isolation,
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


def _passed_small(model: PreTrainedModel, blocks: nn.ModuleList) -> Sequence[_Passed]:
    """Runs the trial with a small residual stream before each block.

    In 16 bits a large one hides in its rounding what is added to it, and any small vector would seem to add up.
    """

    def shrink(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (_shrunk(args[0]), *args[1:]), kwargs
        name = next(key for key in ("hidden_states", *kwargs) if isinstance(kwargs.get(key), Tensor))
        return args, {**kwargs, name: _shrunk(kwargs[name])}

    handles = [block.register_forward_pre_hook(shrink, with_kwargs=True) for block in blocks]
    try:
        with torch.inference_mode(), _watched(blocks) as passed:
            model(input_ids=trial_ids(model, _N_TOKENS), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return passed


def _shrunk(value: Tensor) -> Tensor:
    """Returns a tensor times a power of two, which keeps the bits of its numbers; norms give nearly the same for it."""
    largest = float(value.abs().max())
    return value * 2.0 ** (_SMALL_LOG2 - math.frexp(largest)[1]) if math.isfinite(largest) else value


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


def _projections(blocks: nn.ModuleList, passed: Sequence[_Passed], network: Network) -> dict[str, str]:
    """Finds the linear layer that gives the output of the attention, and the one that gives the output of the MLP."""
    found = {}
    wanted = (("attn.hook_z", _ATTENTION, network.n_heads * network.d_head), ("mlp.hook_post", _MLP, network.d_mlp))

    def gives(block: nn.Module, seen: _Passed, path: str, whole: str, width: int) -> bool:
        """True for a linear layer that takes rows of this width and gives the output of `whole`."""
        entering, leaving, result = seen.inputs.get(path), seen.outputs.get(path), seen.outputs.get(whole)
        if entering is None or leaving is None or result is None or entering.shape[-1] != width:
            return False
        return isinstance(block.get_submodule(path), _LINEAR) and torch.equal(leaving.flatten(), result.flatten())

    for site, words, width in wanted:
        parts = [path for path in passed[0].outputs if path and _is_part(path, words)]
        for path in parts:
            if all(gives(block, seen, path, parts[-1], width) for block, seen in zip(blocks, passed, strict=True)):
                found[site] = f"{path}:in"
                break
    return found


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


def _last(model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Returns the output of the last block; without `positions` the model numbers them itself."""
    arguments = {} if positions is None else {"position_ids": positions}
    with torch.inference_mode(), _watched([blocks[-1]]) as passed:
        model(input_ids=ids, use_cache=False, **arguments)
    return passed[0].outputs[""]
