"""`client.sets`: activation sets on all nodes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from headrace_client.errors import NodeLost
from headrace_client.rpc.convert import sets as convert
from headrace_client.rpc.endpoint import Endpoint, new_request_id
from headrace_client.rpc.nodes import Nodes, pages
from headrace_client.values import ActivationSet, Listing, SetVerification

# Any past time ends a pin.
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


class Sets:
    """Activation sets, as the registry knows them."""

    def __init__(self, registry: Endpoint, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes

    def list(self, *, model: str = "", node: str = "") -> Listing[ActivationSet]:
        """Lists sets, the newest first, all pages."""
        method = "ActivationSetService.ListActivationSets"
        return Listing(pages(self._registry, method, "sets", convert.set_from_pb, model_id=model, node_id=node))

    def get(self, set_id: str) -> Listing[ActivationSet]:
        """Reads one set: one value per node that holds it."""
        answer = self._registry.unary("ActivationSetService.GetActivationSet", set_id=set_id)
        return Listing(convert.set_from_pb(one) for one in answer.sets)

    def verify(self, set_id: str) -> Iterator[SetVerification]:
        """Has each node that holds a set compare all its files with their digests, one node after the other.

        Yields how far it is, twice a second, and for each node one value that is `done`. Damaged segments are set
        aside: starting the extraction again computes their rows. Nodes that are not alive are passed over; raises
        NodeLost if all are.
        """
        holders = [held.node_id for held in self.get(set_id)]
        if self._nodes.only:  # One extractor is asked, whose node has no name here.
            asked = [(holders[0] if len(holders) == 1 else "", self._nodes.only)]
        else:
            asked = [(each.node_id, each) for each in self._nodes.alive() if each.node_id in holders]
        if not asked:
            raise NodeLost(f"no node that holds set {set_id[:16]} is alive: {', '.join(holders)}")
        for node_id, extractor in asked:
            with self._nodes.endpoint(extractor).stream("ExtractionService.VerifySet", set_id=set_id) as stream:
                for message in stream:
                    yield convert.verification_from_pb(message, set_id, node_id)

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
