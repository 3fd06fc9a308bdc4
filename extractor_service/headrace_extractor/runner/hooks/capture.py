"""Captures activations at named places of a network.

The hooks live inside a `with` block, and the forward pass ends as soon as the last requested place has been seen, so
nothing behind it is computed, whatever the order of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Captured = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A hookpoint resolved: what goes into `module`, or what comes out of it, after `take`."""

    name: str
    module: nn.Module
    is_input: bool
    take: Callable[[torch.Tensor], torch.Tensor] | None = None


class HookDidNotFireError(RuntimeError):
    """A forward pass ended without passing a requested place, or passed it twice: a bug in the family table."""


class _AllSeen(BaseException):
    """Ends the forward pass; a BaseException, so that no library takes it for an error."""


@contextmanager
def capture(sites: Sequence[Site]) -> Iterator[Captured]:
    """Fills the dict with one tensor a site during the forward pass in the block, which it ends early.

    Statements of the block behind the forward pass do not run. The tensors are the network's own, not copies, unless a
    site's `take` makes one. Raises HookDidNotFireError if the block ends without them.
    """
    captured: Captured = {}
    wanted = {site.name for site in sites}

    def keep(site: Site, value: torch.Tensor) -> None:
        if site.name in captured:
            raise HookDidNotFireError(f"{site.name} was passed twice in one forward pass")
        captured[site.name] = site.take(value) if site.take else value
        if len(captured) == len(wanted):
            raise _AllSeen

    handles = [_hook(site, keep) for site in sites]
    try:
        yield captured
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(wanted - captured.keys()):
        raise HookDidNotFireError(f"the forward pass did not pass {', '.join(missing)}")


def _hook(site: Site, keep: Callable[[Site, torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    if not site.is_input:
        return site.module.register_forward_hook(lambda _module, _args, output: keep(site, _first(site, output)))

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(site, _first(site, (*args, kwargs.get("hidden_states"), *kwargs.values())))

    return site.module.register_forward_pre_hook(before, with_kwargs=True)


def _first(site: Site, values: Any) -> torch.Tensor:
    """The hidden states: the first tensor that a module is given or returns."""
    if isinstance(values, torch.Tensor):
        return values
    for value in values if isinstance(values, tuple | list) else ():
        if isinstance(value, torch.Tensor):
            return value
    raise HookDidNotFireError(f"{site.name}: no tensor passes there")
