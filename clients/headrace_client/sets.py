"""`client.sets`: activation sets on all nodes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from headrace_client.rpc.convert import sets as convert
from headrace_client.rpc.endpoint import Endpoint, new_request_id
from headrace_client.rpc.nodes import pages
from headrace_client.values import ActivationSet

# Any past time ends a pin.
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


class Sets:
    """Activation sets, as the registry knows them."""

    def __init__(self, registry: Endpoint) -> None:
        self._registry = registry

    def list(self, *, model: str = "", node: str = "") -> Iterator[ActivationSet]:
        """Iterates over sets, the newest first, all pages."""
        method = "ActivationSetService.ListActivationSets"
        return pages(self._registry, method, "sets", convert.set_from_pb, model_id=model, node_id=node)

    def get(self, set_id: str) -> tuple[ActivationSet, ...]:
        """Reads one set: one value per node that holds it."""
        answer = self._registry.unary("ActivationSetService.GetActivationSet", set_id=set_id)
        return tuple(convert.set_from_pb(one) for one in answer.sets)

    def pin(self, set_id: str, owner: str, *, reason: str = "", expire_time: datetime | None = None) -> None:
        """Keeps a set from eviction, for ever or until `expire_time`; a second pin changes reason and end."""
        fields = convert.pin_fields(set_id, owner, reason, expire_time)
        self._registry.unary("ActivationSetService.PinActivationSet", request_id=new_request_id(), **fields)

    def unpin(self, set_id: str, owner: str) -> None:
        """Ends an owner's pin; a missing pin is no error."""
        self.pin(set_id, owner, expire_time=_LONG_AGO)

    def delete(self, set_id: str) -> None:
        """Has all nodes remove a set, within seconds. StateConflict while it is pinned or used."""
        self._registry.unary("ActivationSetService.DeleteActivationSet", request_id=new_request_id(), set_id=set_id)
