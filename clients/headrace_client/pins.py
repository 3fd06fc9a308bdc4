"""`client.pins`: wishes that a model stays where it is resident."""

from __future__ import annotations

from datetime import datetime

from headrace_client.rpc.convert.residencies import pin_from_pb, pin_to_pb
from headrace_client.rpc.endpoint import Endpoint, new_request_id
from headrace_client.rpc.nodes import pages
from headrace_client.values import Listing, Pin


class Pins:
    """Pins in the registry; one for each model, node and owner."""

    def __init__(self, registry: Endpoint) -> None:
        self._registry = registry

    def pin(
        self, model_id: str, owner: str, *, reason: str = "", node: str = "", expire_time: datetime | None = None
    ) -> Pin:
        """Pins a model, on one node or everywhere, for ever or until `expire_time`.

        Pinning again changes reason and end. A pinned model is neither evicted nor unloaded for being idle. Nothing is
        loaded now, but whenever a node starts, pinned models that are on no device are loaded.
        """
        pin = pin_to_pb(Pin(model_id=model_id, node_id=node, owner=owner, reason=reason, expire_time=expire_time))
        answer = self._registry.unary("ResidencyService.PinModel", request_id=new_request_id(), pin=pin)
        return pin_from_pb(answer.pin)

    def unpin(self, model_id: str, owner: str, *, node: str = "") -> None:
        """Removes a pin; a missing pin is no error."""
        self._registry.unary(
            "ResidencyService.UnpinModel", request_id=new_request_id(), model_id=model_id, owner=owner, node_id=node
        )

    def list(self, *, model: str = "") -> Listing[Pin]:
        """Lists living pins by model, node and owner, all pages."""
        return Listing(pages(self._registry, "ResidencyService.ListPins", "pins", pin_from_pb, model_id=model))
