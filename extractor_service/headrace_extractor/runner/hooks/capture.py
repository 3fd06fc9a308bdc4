"""Captures activations at named places of a network.

The hooks live inside a `with` block, and the forward pass ends as soon as the last requested place has been seen, so
nothing behind it is computed, in whatever order the places were requested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Captured = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A hookpoint bound to a module: its value is the module's input or output after `take`."""

    name: str
    module: nn.Module
    is_input: bool
    take: Callable[[torch.Tensor], torch.Tensor] | None = None


class HookDidNotFireError(RuntimeError):
    """A forward pass ended without passing a requested place, or passed it twice: a bug in the family table."""


class _AllSeen(BaseException):
    """Ends the forward pass; a BaseException, so that no library handles it as an error."""


@contextmanager
def capture(sites: Sequence[Site]) -> Iterator[Captured]:
    """Fills the yielded dict with one tensor a site during the forward pass in the block, and ends the pass early.

    Statements of the block behind the forward pass do not run. The tensors are the network's own, not copies, unless a
    site's `take` makes one. Raises HookDidNotFireError if a site's tensor is missing at the end of the block.
    """
    captured: Captured = {}
    wanted = {site.name for site in sites}

    def keep(site: Site, values: Any) -> None:
        # The hidden states are the first tensor that a module is given or returns.
        several = values if isinstance(values, tuple | list) else (values,)
        value = next((each for each in several if isinstance(each, torch.Tensor)), None)
        if value is None:
            raise HookDidNotFireError(f"{site.name}: no tensor passes there")
        if site.name in captured:
            raise HookDidNotFireError(f"{site.name} was passed twice in one forward pass")
        captured[site.name] = site.take(value) if site.take else value
        if len(captured) == len(wanted):
            raise _AllSeen

    def enter(site: Site, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(site, (*args, kwargs.get("hidden_states"), *kwargs.values()))

    def leave(site: Site, _module: nn.Module, _args: Any, output: Any) -> None:
        keep(site, output)

    handles = [
        site.module.register_forward_pre_hook(partial(enter, site), with_kwargs=True)
        if site.is_input
        else site.module.register_forward_hook(partial(leave, site))
        for site in sites
    ]
    try:
        yield captured
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(wanted - captured.keys()):
        raise HookDidNotFireError(f"the forward pass did not pass {', '.join(missing)}")
