"""The registry as the sets of a node need it; implemented in `rpc/`, and by a fake in the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from headrace_extractor.sets.notes import HeldSet, SetOrders


class SetRegistry(Protocol):
    """Activation sets in the registry. Every method may raise RegistryUnavailable."""

    async def report_set(self, epoch: int, held: HeldSet, *, evict: bool = False) -> SetOrders:
        """Reports a set of this node; with `evict`, asks whether it may be evicted. May raise EpochStale."""

    async def set_orders(self) -> Mapping[str, SetOrders]:
        """The orders about each set that the registry has listed for this node, by id."""
