"""The hookpoints of a model from its config alone: names, shapes, places, and why a hookpoint can't be captured.

A name is `hook_embed`, `blocks.<layer>.<site>` or `ln_final.hook_normalized` in TransformerLens spelling, or a module
of the base model with `:in` or `:out`. `hook_attn_out` and `hook_mlp_out` are the terms added to the residual stream:
in every block `resid_pre + attn_out + mlp_out == resid_post`. All other spellings of a request (`names.py`) are
replaced by one of these names before identity or log depend on it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from headrace_extractor.corpora.recipe import PACKED, Recipe
from headrace_extractor.errors import FieldInvalid, HookpointNotFound, ModelUnsupported
from headrace_extractor.hookpoints.architectures import family_of
from headrace_extractor.hookpoints.names import (
    BLOCK_SITE,
    Aliases,
    aliases_of,
    expand_layers,
    forward_order,
    layer_of,
    relative_path,
    split_path,
)
from headrace_extractor.hookpoints.places import (
    EMBED,
    FINAL,
    NOT_AT_ALL,
    SITES,
    WHOLE,
    Copied,
    Take,
    place_of,
    place_unknown,
)
from headrace_extractor.hookpoints.weight_shapes import Shape, WeightShapes, module_shape
from headrace_extractor.models import ModelInfo
from headrace_models.config import Network
from headrace_models.errors import ConfigInvalid, JsonInvalid
from headrace_models.json_files import read_config

__all__ = ["EMBED", "FINAL", "SITES", "Catalogue", "Hookpoint", "catalogue_of", "forward_order", "layer_of"]

# Returns the shape of a row at a module's side, `in` or `out`, or why it can't be told.
ShapeOf: TypeAlias = Callable[[str, str], Shape | str]

MAX_NEAREST = 5
# Most hookpoints in a request; wildcards over the largest models stay below.
MAX_HOOKPOINTS = 4096
MAX_WILDCARDS = 64  # Each is compared with every name of the model.


@dataclass(frozen=True, slots=True, kw_only=True)
class Hookpoint:
    """A named place; `shape` is the shape of a row, `unavailable` says why the hookpoint can't be captured."""

    name: str
    shape: tuple[int, ...]
    module: str = ""  # `<path>:in` or `:out` below the base model; empty if only loading tells it
    take: Take = WHOLE
    unavailable: str = ""

    @property
    def width(self) -> int:
        """Elements in one row."""
        return math.prod(self.shape)


class Catalogue:
    """The hookpoints of a model, in forward order. `shape_of` tells the shapes of modules that are no site."""

    def __init__(self, network: Network, shape_of: ShapeOf | None = None) -> None:
        self.network = network
        self.family = family_of(network)
        self._shape_of = shape_of or (lambda _path, _side: "shapes of modules are not known here")

    @cached_property
    def offered(self) -> tuple[Hookpoint, ...]:
        """All named sites; a site that can't be captured has the reason in `unavailable`."""
        layers = range(self.network.n_layers)
        blocks = [self._hookpoint(f"blocks.{layer}.{site}", site, layer) for layer in layers for site in SITES]
        if not blocks:
            return ()
        return (self._hookpoint(EMBED, EMBED), *blocks, self._hookpoint(FINAL, FINAL))

    def resolve(self, names: Iterable[str]) -> tuple[Hookpoint, ...]:
        """Returns the hookpoints of names, wildcards, ranges, aliases and module paths, each once, in forward order.

        Raises FieldInvalid for no names or too many, and HookpointNotFound for an unknown name, with the nearest names,
        and for a hookpoint that can't be captured.
        """
        asked = tuple(dict.fromkeys(names))
        if len(asked) > MAX_HOOKPOINTS:
            raise _too_many(len(asked))
        if sum("*" in name for name in asked) > MAX_WILDCARDS:
            raise FieldInvalid(f"Use at most {MAX_WILDCARDS} names with wildcards.", field="spec.hookpoints")
        found = {point.name: point for name in asked for point in self._resolve_one(name)}
        if not found:
            raise FieldInvalid("Name at least one hookpoint; ListHookpoints lists them.", field="spec.hookpoints")
        if len(found) > MAX_HOOKPOINTS:
            raise _too_many(len(found))
        return tuple(sorted(found.values(), key=lambda point: forward_order(point.name)))

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of a row by hookpoint; raises the errors of `resolve`."""
        return {point.name: point.shape for point in self.resolve(names)}

    def named(self, name: str, known: Hookpoint | None = None) -> Hookpoint:
        """Returns `known`, else the hookpoint of that name; raises HookpointNotFound if it can't be captured."""
        point = known or self._by_name.get(name)
        if point is None:
            raise self._not_found(name)
        return _available(point)

    def _resolve_one(self, name: str) -> list[Hookpoint]:
        n_layers = self.network.n_layers
        if name in self._by_name:
            return [_available(self._by_name[name])]
        if split := split_path(name):
            paths = relative_path(split[0], self.family, n_layers)
            if not paths:
                raise self._not_found(name)
            return [self._of_module(path, split[1], name) for path in paths]
        known = []
        for spelled in expand_layers(name, self._names, n_layers):
            target = self._names[spelled]
            path, side = split_path(target) or ("", "")
            known.append(self._by_name.get(target) or self._of_module(path, side, target))
        if not known:
            raise self._not_found(name)
        # A wildcard leaves out hookpoints that can't be captured, such as hook_pre of the sparse layers.
        available = [point for point in known if not point.unavailable]
        return available or [_available(known[0])]

    def _of_module(self, path: str, side: str, asked: str) -> Hookpoint:
        module = f"{path}:{side}"
        if module in self._by_module:
            return self._by_module[module]
        shape = self._shape_of(path, side)
        if isinstance(shape, str):
            raise self._not_found(asked, shape)
        # A copy: the network may change the tensor of an arbitrary module in place.
        return Hookpoint(name=module, shape=shape, module=module, take=Copied())

    def _hookpoint(self, name: str, site: str, layer: int = 0) -> Hookpoint:
        if self.family is None:
            place = place_unknown(self.network, site)
        else:
            place = place_of(self.family, self.network, site, layer)
        return Hookpoint(
            name=name, shape=place.shape, module=place.module, take=place.take, unavailable=place.unavailable
        )

    @cached_property
    def _by_name(self) -> Mapping[str, Hookpoint]:
        return {point.name: point for point in self.offered}

    @cached_property
    def _by_module(self) -> Mapping[str, Hookpoint]:
        """Sites by their module, if they are the module's whole tensor: its path is another name for the site."""
        whole = [point for point in self.offered if point.module and point.take in (WHOLE, Copied())]
        return {point.module: point for point in whole}

    @cached_property
    def _names(self) -> Aliases:
        """Maps each spelling to a name of `offered`, or to a module path."""
        own = {point.name: point.name for point in self.offered}
        return own | aliases_of(self.family, self.network.n_layers) if self.family else own

    def _not_found(self, name: str, why: str = "") -> HookpointNotFound:
        names = [point.name for point in self.offered if not point.unavailable]
        shown = name[:255]
        metadata = {"hookpoint": shown}
        n_layers = self.network.n_layers
        if not names:
            hint = "this architecture offers none"
        else:
            nearest = self._nearest(shown, names)
            layers = f"layers 0 to {n_layers - 1}"
            hint = f"{why}; " if why else ""
            hint += f"the nearest are {', '.join(nearest)}; the model has {layers}, ListHookpoints lists all names"
            metadata |= {"nearest": ",".join(nearest), "n_layers": str(n_layers)}
        return HookpointNotFound(f"No hookpoint {shown!r}: {hint}.", metadata=metadata, resource=("hookpoint", shown))

    def _nearest(self, name: str, names: Sequence[str]) -> list[str]:
        """Returns close names, best first; from the layer that the name mentions, if the model has that layer."""
        if (match := BLOCK_SITE.fullmatch(name)) and int(match[1]) >= self.network.n_layers:
            return [f"blocks.{self.network.n_layers - 1}.{match[2]}"]
        number = re.search(r"[0-9]+", name)
        same_layer = [known for known in names if number and layer_of(known) == int(number[0])]
        candidates = same_layer or names
        close = difflib.get_close_matches(name, candidates, n=MAX_NEAREST, cutoff=0.0)
        paths = relative_path(name, self.family, self.network.n_layers)
        there = [
            self._by_module[module]
            for path in paths
            for module in (f"{path}:out", f"{path}:in")
            if module in self._by_module
        ]
        exact = [point.name for point in there if not point.unavailable]
        return list(dict.fromkeys([*exact, *close]))[:MAX_NEAREST]

    def with_shapes(self, shape_of: ShapeOf) -> Catalogue:
        """Returns the same catalogue with another way to the shapes of modules."""
        other = Catalogue(self.network, shape_of)
        vars(other)["offered"] = self.offered
        return other


def catalogue_of(model: ModelInfo) -> Catalogue:
    """Reads a model's config in this process; its weight files' headers only for names that are module paths."""
    network = network_of(model)
    return Catalogue(
        network, lambda path, side: module_shape(path, side, network, WeightShapes.of_folder(model.files_path))
    )


def network_of(model: ModelInfo) -> Network:
    """Reads the config beside a model's files; without one, takes the numbers that the registry has.

    Raises ModelUnsupported for a config with numbers beyond their bounds.
    """
    try:
        return Network.of_config(read_config(Path(model.files_path)))
    except (OSError, JsonInvalid):
        return registered_network(model)
    except ConfigInvalid as exc:
        raise ModelUnsupported(
            f"config.json of {model.id}: {exc}; mend the config and prepare the model again."
        ) from exc


def registered_network(model: ModelInfo) -> Network:
    """Returns the few numbers of a model that the registry has."""
    return Network(model_type=model.model_type, n_layers=model.n_layers, d_model=model.d_model)


def check_isolation(recipe: Recipe, catalogue: Catalogue) -> None:
    """Raises FieldInvalid if the recipe keeps packed documents apart and the model's family can't."""
    apart = recipe.packing == PACKED and not recipe.attend_across_documents
    if apart and catalogue.family and catalogue.family.isolation == NOT_AT_ALL:
        raise cannot_isolate(catalogue.network.model_type)


def cannot_isolate(model_type: str, metadata: Mapping[str, str] | None = None) -> FieldInvalid:
    """Returns the error for a recipe that packs documents which the model can't keep apart."""
    return FieldInvalid(
        f"Documents in one sequence of a {model_type} model can't be kept apart; use packing one_document, or let them "
        "attend to one another.",
        field="spec.recipe.packing",
        metadata=metadata or {},
    )


def attention_of(model: ModelInfo) -> str:
    """Returns the attention implementation that a model's family needs; empty for the usual one, sdpa."""
    family = family_of(registered_network(model))  # Its model type decides, which the registry has too.
    return family.attention if family and family.attention != "sdpa" else ""


def _too_many(n_asked: int) -> FieldInvalid:
    return FieldInvalid(
        f"{n_asked} hookpoints are asked for; take at most {MAX_HOOKPOINTS} at once.", field="spec.hookpoints"
    )


def _available(point: Hookpoint) -> Hookpoint:
    if point.unavailable:
        raise HookpointNotFound(
            f"{point.name} can't be captured: {point.unavailable}. ListHookpoints says what can.",
            metadata={"hookpoint": point.name},
            resource=("hookpoint", point.name),
        )
    return point
