"""Names of places in a network, and which of them an architecture offers, from its config alone.

A name is `blocks.<layer>.<site>` in TransformerLens spelling. `hook_attn_out` and `hook_mlp_out` are what is added to
the residual stream: in every block `resid_pre + attn_out + mlp_out == resid_post`. An architecture whose attention or
MLP module returns something else has these sites listed as unavailable, with the reason, rather than a near miss.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from extractor_service.errors import FieldInvalid, HookpointNotFound, NotImplementedYet

SITES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")  # in the order of the forward pass
MAX_NEAREST = 5

# Blocks whose attention and MLP modules return exactly what is added to the residual stream.
_SIMPLE = frozenset(
    (
        *("arcee", "gemma", "gpt2", "helium", "llama", "ministral", "mistral", "mixtral", "olmo", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
    )
)
_NORMED = "its blocks normalise the output of attention and MLP before adding it, which is not captured yet"
_SCALED = "its blocks scale the output of attention and MLP before adding it, which is not captured yet"
# Blocks of the usual shape, where only the residual stream itself can be captured by now.
_RESID_ONLY = {
    "gemma2": _NORMED,
    "gemma3": _NORMED,
    "gemma3_text": _NORMED,
    "glm4": _NORMED,
    "granite": _SCALED,
    "olmo2": _NORMED,
    "olmo3": _NORMED,
}
_NAME = re.compile(rf"blocks\.(0|[1-9][0-9]{{0,5}})\.({'|'.join(SITES)})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hookpoint:
    """A named place; `unavailable` says why it can't be captured."""

    name: str
    width: int  # elements in one row
    unavailable: str = ""


def available(model_type: str, n_layers: int, d_model: int) -> tuple[Hookpoint, ...]:
    """Returns every hookpoint of a model in forward order, those that can't be captured with the reason."""
    return tuple(
        Hookpoint(name=f"blocks.{layer}.{site}", width=d_model, unavailable=_why_not(model_type, site))
        for layer in range(n_layers)
        for site in SITES
    )


def check(names: Iterable[str], offered: Sequence[Hookpoint]) -> tuple[str, ...]:
    """Returns the names without duplicates, in forward order.

    Raises FieldInvalid for none at all, HookpointNotFound with the nearest names, NotImplementedYet for one that is
    unavailable.
    """
    by_name = {hookpoint.name: hookpoint for hookpoint in offered}
    wanted = set(names)
    if not wanted:
        raise FieldInvalid("Name at least one hookpoint; ListHookpoints lists them.", field="spec.hookpoints")
    for name in sorted(wanted):
        if name not in by_name:
            raise _not_found(name, offered)
        _refuse_unavailable(by_name[name])
    return tuple(sorted(wanted, key=forward_order))


def parse(name: str) -> tuple[int, str]:
    """Splits a name into (layer, site); raises ValueError on anything else."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not a hookpoint: {name!r}")
    return int(match[1]), match[2]


def depth(name: str) -> int:
    """Returns the layer it lies in, counted from 0: no block behind it needs to run."""
    return parse(name)[0]


def forward_order(name: str) -> tuple[int, int]:
    """Returns a sort key by the moment of capture."""
    layer, site = parse(name)
    return layer, SITES.index(site)


def _why_not(model_type: str, site: str) -> str:
    if model_type in _SIMPLE:
        return ""
    if model_type in _RESID_ONLY:
        return _RESID_ONLY[model_type] if site in ("hook_attn_out", "hook_mlp_out") else ""
    return f"the architecture {model_type or '(none named)'} is not captured yet"


def _refuse_unavailable(hookpoint: Hookpoint) -> None:
    if hookpoint.unavailable:
        raise NotImplementedYet(
            f"{hookpoint.name} can't be captured: {hookpoint.unavailable}. ListHookpoints says what can.",
            metadata={"hookpoint": hookpoint.name},
            resource=("hookpoint", hookpoint.name),
        )


def _not_found(name: str, offered: Sequence[Hookpoint]) -> HookpointNotFound:
    names = [hookpoint.name for hookpoint in offered if not hookpoint.unavailable]
    n_layers = 1 + max((depth(known) for known in names), default=-1)
    metadata = {"hookpoint": name[:255]}
    if n_layers == 0:
        hint = "this architecture offers none yet"
    elif layered := _NAME.fullmatch(name):
        nearest = [f"blocks.{n_layers - 1}.{layered[2]}"]
        hint = f"the model has layers 0 to {n_layers - 1}, the nearest is {nearest[0]}"
        metadata |= {"nearest": nearest[0], "n_layers": str(n_layers)}
    else:
        nearest = _nearest(name, names)
        hint = (
            f"the nearest are {', '.join(nearest)}; names look like blocks.<0 to {n_layers - 1}>.<{' | '.join(SITES)}>"
        )
        metadata |= {"nearest": ",".join(nearest), "n_layers": str(n_layers)}
    return HookpointNotFound(
        f"No hookpoint {name[:255]!r}: {hint}.", metadata=metadata, resource=("hookpoint", name[:255])
    )


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Returns close names, best first; sites of the layer that the name mentions, if it mentions a valid one."""
    number = re.search(r"[0-9]+", name[:255])
    same_layer = [known for known in names if number and depth(known) == int(number[0])]
    candidates = same_layer or names
    return difflib.get_close_matches(name[:255], candidates, n=MAX_NEAREST, cutoff=0.0)
