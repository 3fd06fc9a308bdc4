"""`client.sets`: activation sets on all nodes."""

from __future__ import annotations

from collections.abc import Iterator

from headrace_client import _convert as convert
from headrace_client._nodes import pages
from headrace_client._transport import Endpoint
from headrace_client.values import ActivationSet


class Sets:
    """What the registry knows of activation sets."""

    def __init__(self, registry: Endpoint) -> None:
        self._registry = registry

    def list(self, *, model: str = "") -> Iterator[ActivationSet]:
        """Iterates over sets, the newest first, all pages."""
        method = "ActivationSetService.ListActivationSets"
        return pages(self._registry, method, "sets", convert.set_from_pb, model_id=model)

    def get(self, set_id: str) -> tuple[ActivationSet, ...]:
        """Reads one set: one value per node that holds it."""
        answer = self._registry.unary("ActivationSetService.GetActivationSet", set_id=set_id)
        return tuple(convert.set_from_pb(one) for one in answer.sets)
