"""The spellings that a request may use for a hookpoint, beside its own name.

- the names of TransformerLens' bridge: `blocks.4.hook_out`, `blocks.4.attn.q.hook_out`, `embed.hook_out`;
- `*` for any run of characters, `a-b` for a range of layers (both ends included), a negative layer to count from the
  end: `blocks.*.hook_resid_post`, `blocks.4-7.hook_out`, `blocks.-1.hook_resid_post`;
- module paths in transformers' spelling, with `:in` or `:out`, with or without the prefix of the base model:
  `model.layers.4.mlp:out`, `transformer.h.0-3.attn:out`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from headrace_extractor.hookpoints.places import EMBED, FINAL, SITES, Family, Scaled
from headrace_extractor.hookpoints.weight_shapes import HEADED

Aliases = dict[str, str]

BLOCK_SITE = re.compile(rf"blocks\.(0|[1-9][0-9]{{0,5}})\.({'|'.join(map(re.escape, SITES))})")
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_LAYER_SPEC = re.compile(rf"\*|-?{_NUMBER}|{_NUMBER}-{_NUMBER}")
_LAYER_PART = re.compile(r"\.([0-9]{1,6})(?=[.:]|$)")
_PATH = re.compile(r"([A-Za-z_*][A-Za-z0-9_.*-]*):(in|out)")
_PATH_ONLY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_*-]+)*")
_ATTENTIONS = frozenset({"self_attn:out", "attn:out", "self_attention:out", "attention:out"})
MAX_NAME = 160  # A column's name, with a suffix, becomes the name of a folder, which may have 255 bytes.


def forward_order(name: str) -> tuple[int, int, int, str]:
    """Returns a sort key: by layer, in it the sites in the order of the forward pass, then module paths."""
    if name == EMBED:
        return (0, 0, 0, "")
    if name == FINAL:
        return (2, 0, 0, "")
    if match := BLOCK_SITE.fullmatch(name):
        return (1, int(match[1]), SITES.index(match[2]), "")
    layer = layer_of(name)
    return (3, 0, 0, name) if layer is None else (1, layer, len(SITES), name)


def layer_of(name: str) -> int | None:
    """Returns the layer of a hookpoint, counted from 0; None if it lies outside of the layers."""
    match = _LAYER_PART.search(name)
    return int(match[1]) if match else None


def split_path(name: str) -> tuple[str, str] | None:
    """Splits a module path into (path, `in` or `out`); None for anything else."""
    match = _PATH.fullmatch(name) if len(name) <= MAX_NAME else None
    return (match[1], match[2]) if match else None


def expand_layers(name: str, known: Mapping[str, str], n_layers: int) -> list[str]:
    """Returns the known spellings that a name with wildcards, a range or a negative layer stands for."""
    if len(name) > MAX_NAME:
        return []
    if name in known:
        return [name]
    head, _, rest = name.partition(".")
    spec, _, site = rest.partition(".")
    if head == "blocks" and site and _LAYER_SPEC.fullmatch(spec):
        of_first = {name: target for name, target in known.items() if name.startswith("blocks.0.")}
        fitting = [name.split(".", 2)[2] for name in _matching(f"blocks.0.{site}", of_first)]
        return [f"blocks.{layer}.{each}" for layer in _layers(spec, n_layers) for each in fitting]
    return _matching(name, known) if "*" in name else []


def relative_path(path: str, family: Family | None, n_layers: int) -> list[str]:
    """Returns the paths below the base model that a module path stands for, one for each layer it names."""
    if len(path) > MAX_NAME or not _PATH_ONLY.fullmatch(path):
        return []
    parts = path.split(".")
    blocks = family.blocks.split(".") if family else []
    roots = (
        {blocks[0], *(place.split(".")[0] for place in (family.embed.split(":")[0], family.final))} if family else set()
    )
    while len(parts) > 1 and parts[0] in HEADED and parts[0] not in roots:
        parts = parts[1:]
    at = len(blocks)
    if not family or parts[:at] != blocks or len(parts) <= at:
        return [".".join(parts)] if not any("*" in part for part in parts) else []
    if any("*" in part for part in parts[at + 1 :]) or not _LAYER_SPEC.fullmatch(parts[at]):
        return []
    return [".".join((*blocks, str(layer), *parts[at + 1 :])) for layer in _layers(parts[at], n_layers)]


def aliases_of(family: Family, n_layers: int) -> Aliases:
    """Returns the bridge's spellings of a family's hookpoints: each maps to a name, or to a module path."""
    of_block = _block_aliases(family)
    found = {"embed_ln.hook_out" if "norm" in family.embed else "embed.hook_out": EMBED}
    for layer in range(n_layers):
        for spelled, target in of_block.items():
            is_site = target in SITES
            found[f"blocks.{layer}.{spelled}"] = (
                f"blocks.{layer}.{target}" if is_site else f"{family.blocks}.{layer}.{target}"
            )
    return found


def _block_aliases(family: Family) -> Aliases:
    """Returns the bridge's spellings within a block: each maps to a site, or to a module path below the block."""
    block = family.block
    found = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post"}
    if "attn.hook_z" not in block:
        return found
    found |= {
        "attn.q.hook_out": "attn.hook_q",
        "attn.k.hook_out": "attn.hook_k",
        "attn.v.hook_out": "attn.hook_v",
        "attn.o.hook_in": "attn.hook_z",
        "mlp.out.hook_in": "mlp.hook_post",
    }
    gated = "gate" in block["mlp.hook_pre"]
    found["mlp.gate.hook_out" if gated else "mlp.in.hook_out"] = "mlp.hook_pre"
    found |= _output_aliases(family, "attn", "hook_attn_out", _ATTENTIONS)
    found |= _output_aliases(family, "mlp", "hook_mlp_out", frozenset({"mlp:out"}))
    norm_is_last = block["hook_attn_out"].endswith("norm:out")
    middle = block["hook_resid_mid"]
    if norm_is_last and middle == "mlp:in":  # OLMo 2: its two norms come after attention and after the MLP.
        return found | {
            "ln1.hook_out": "hook_attn_out",
            "ln2.hook_out": "hook_mlp_out",
            "mlp.hook_in": "hook_resid_mid",
        }
    found["ln2.hook_in"] = "hook_resid_mid"
    if norm_is_last:
        found |= {"ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out"}
    return found


def _output_aliases(family: Family, part: str, site: str, own: frozenset[str]) -> Aliases:
    """Returns the spelling for the output of attention or MLP.

    In the bridge `attn.hook_out` is the module's output, which is not always the term added to the residual stream.
    """
    place, scaled = family.block[site], isinstance(family.takes.get(site), Scaled)
    if place in own and not scaled:
        return {f"{part}.hook_out": site}
    if scaled or place.endswith("norm:out"):
        module = family.block["attn.hook_q"].split(".")[0] if part == "attn" else "mlp"
        return {f"{part}.hook_out": f"{module}:out"}
    return {f"{part}.{'o' if part == 'attn' else 'out'}.hook_out": site}


def _matching(pattern: str, known: Mapping[str, str]) -> list[str]:
    """Returns the known names that fit a pattern; aliases only if no hookpoint's own name fits."""
    fitting = [name for name in known if _fits(pattern, name)]
    own = [name for name in fitting if known[name] == name]
    return own or fitting


def _fits(pattern: str, name: str) -> bool:
    """Returns whether a name fits a pattern in which `*` is any run of characters.

    One pass over the name: a pattern comes from outside, and a regular expression could take far longer.
    """
    first, *others = pattern.split("*")
    if not others:
        return pattern == name
    at, last = len(first), others.pop()
    for part in others:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return name.startswith(first) and name.endswith(last) and len(name) - len(last) >= at


def _layers(spec: str, n_layers: int) -> range:
    """Returns the layers for `*`, a number, a negative number or a range; none if one lies beyond the model."""
    if spec == "*":
        return range(n_layers)
    if "-" in spec[1:]:
        first, last = (int(end) for end in spec.split("-"))
        return range(first, last + 1) if last < n_layers else range(0)
    layer = int(spec)
    layer += n_layers if spec.startswith("-") else 0
    return range(layer, layer + 1) if 0 <= layer < n_layers else range(0)
