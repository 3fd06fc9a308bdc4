"""`client.residencies`: which model is in which device's memory."""

from __future__ import annotations

from headrace_client import _convert as convert
from headrace_client._nodes import Nodes
from headrace_client._transport import Endpoint, new_request_id
from headrace_client.values import Residency


class Residencies:
    """Residencies, as the registry decides them."""

    def __init__(self, registry: Endpoint, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes

    def list(self, *, model: str = "", node: str = "", include_ended: bool = False) -> tuple[Residency, ...]:
        """Lists residencies, the newest first."""
        return self._nodes.residencies(model_id=model, node_id=node, include_ended=include_ended)

    def load(self, model_id: str, *, node: str = "", device: str = "") -> Residency:
        """Asks for a model to become resident; answers at once with a residency that may still be loading."""
        answer = self._registry.unary(
            "ResidencyService.LoadModel",
            request_id=new_request_id(),
            model_id=model_id,
            node_id=node,
            device_id=device,
        )
        return convert.residency_from_pb(answer.residency)

    def unload(self, model_id: str, *, node: str = "", force: bool = False) -> tuple[Residency, ...]:
        """Drains and unloads a model on one node, or everywhere; ModelInUse while leased, unless `force`."""
        answer = self._registry.unary(
            "ResidencyService.UnloadModel", request_id=new_request_id(), model_id=model_id, node_id=node, force=force
        )
        return tuple(convert.residency_from_pb(one) for one in answer.residencies)
