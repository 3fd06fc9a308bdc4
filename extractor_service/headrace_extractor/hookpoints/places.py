"""The places of hookpoints in a network, as data: module paths, the part taken of a module's tensor, and row shapes.

A place is `<module path>:in` or `:out`, below the base model (without its language-model head); block paths are below
the block. If a module's tensor is not yet the activation (a fused projection to cut, a factor), its `Take` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_models.config import Network

# In the order of the forward pass of one block.
SITES = (
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
EMBED = "hook_embed"
FINAL = "ln_final.hook_normalized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """The way from a module's tensor to the activation. This base class takes the tensor as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(Take):
    """Slots `first` to `last` (exclusive) of each group; the last dimension is groups x slots x width of a slot."""

    groups: int = 1
    slots: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(Take):
    """The tensor times a number of the config: the block multiplies too, before it adds the tensor."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied(Take):
    """A copy: the network changes this tensor in place afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalized(Take):
    """The input of a norm after normalisation, but before the norm's weight and bias."""


WHOLE = Take()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The module at which a hookpoint is captured, and the shape of a row; `unavailable` says why it can't be."""

    path: str = ""
    side: str = "out"
    take: Take = WHOLE
    shape: tuple[int, ...] = ()
    unavailable: str = ""

    @property
    def module(self) -> str:
        """`<path>:<side>`; empty if the hookpoint is unavailable or only loading tells its module."""
        return f"{self.path}:{self.side}" if self.path else ""


# How documents that share a sequence are kept apart.
BY_POSITIONS = "positions"  # transformers infers the borders from `position_ids`.
BY_MASK = "mask"  # A mask is passed to the model.
BY_BLOCK_MASK = "block_mask"  # A mask and restarting ALiBi are passed to each block.
NOT_AT_ALL = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of base model. `block` maps sites to places below the block, `without` others to why they have none."""

    blocks: str = "layers"
    embed: str = "embed_tokens:out"
    final: str = "norm"
    block: Mapping[str, str]
    without: Mapping[str, str] = field(default_factory=dict)
    takes: Mapping[str, Take] = field(default_factory=dict)
    attention: str = "sdpa"  # `eager` where transformers has no sdpa, or one without soft-capping
    isolation: str = BY_POSITIONS
    causal: bool = True


SPARSE = "its tokens go through experts of their own; hook_mlp_out is what they add"
_UNKNOWN = "which module has it is not known for the architecture {}; name the module with :in or :out"
_NO_WIDTH = "the model's config.json does not tell its width"


def place_of(family: Family, network: Network, site: str, layer: int = 0) -> Place:
    """Returns the place of a site in a network; `layer` counts for sites of a block only."""
    shape = _shape(network, site)
    why = family.without.get(site, "")
    if not why and site in ("mlp.hook_pre", "mlp.hook_post") and is_sparse(network, layer):
        why = SPARSE
    if not why and not all(shape):
        why = _NO_WIDTH
    if why:
        return Place(shape=shape, unavailable=why)
    if site == FINAL:
        return Place(path=family.final, side="in", take=Normalized(), shape=shape)
    below, _, side = (family.embed if site == EMBED else family.block[site]).partition(":")
    path = below if site == EMBED else ".".join(filter(None, (family.blocks, str(layer), below)))
    return Place(path=path, side=side, take=family.takes.get(site, WHOLE), shape=shape)


def _shape(network: Network, site: str) -> tuple[int, ...]:
    if site in ("attn.hook_q", "attn.hook_z"):
        return (network.n_heads, network.d_head)
    if site in ("attn.hook_k", "attn.hook_v"):
        return (network.n_kv_heads, network.d_head)
    return (network.d_mlp,) if site in ("mlp.hook_pre", "mlp.hook_post") else (network.d_model,)


def is_sparse(network: Network, layer: int) -> bool:
    """Returns whether a block's MLP is a choice of experts."""
    fields = network.fields
    if network.model_type == "mixtral":
        return True
    if network.model_type not in ("qwen2_moe", "qwen3_moe"):
        return False
    every = fields.get("decoder_sparse_step", 1)
    return layer not in (fields.get("mlp_only_layers") or ()) and (layer + 1) % every == 0


# Sites that can be found in an unknown architecture, with proof, once the model is loaded.
PROVABLE = frozenset(
    {
        *("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid"),
        *("mlp.hook_post", "hook_mlp_out", "hook_resid_post"),
    }
)


def place_unknown(network: Network, site: str) -> Place:
    """Returns the place of a site in an unknown architecture, which has no module before the model is loaded."""
    shape = _shape(network, site)
    if site not in PROVABLE:
        return Place(shape=shape, unavailable=_UNKNOWN.format(network.model_type or "(none named)"))
    return Place(shape=shape, unavailable="" if all(shape) else _NO_WIDTH)
