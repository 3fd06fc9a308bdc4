"""`client.residencies`: which model is in which device's memory."""

from __future__ import annotations

from collections.abc import Iterator

from headrace_client.rpc.convert.residencies import residency_event_from_pb, residency_from_pb
from headrace_client.rpc.endpoint import STREAM_LIFE_S, Endpoint, new_request_id
from headrace_client.rpc.nodes import Nodes
from headrace_client.rpc.server_stream import ServerStream
from headrace_client.rpc.watch import watch
from headrace_client.values import Residency, ResidencyEvent


class Residencies:
    """Residencies, as the registry decides them."""

    def __init__(self, registry: Endpoint, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes

    def list(self, *, model: str = "", node: str = "", include_ended: bool = False) -> tuple[Residency, ...]:
        """Lists residencies, the newest first."""
        return self._nodes.residencies(model_id=model, node_id=node, include_ended=include_ended)

    def watch(
        self, *, model: str = "", after_seq: int = 0, deadline_s: float | None = None
    ) -> Iterator[ResidencyEvent]:
        """Yields present residencies, then every change, of one model or all; reconnects behind the last event seen.

        With `after_seq` it begins with the events since then, as far as they are still kept.
        """

        def connect(seq: int, life_s: float | None) -> ServerStream:
            return self._registry.stream(
                "ResidencyService.WatchResidencies", life_s=life_s or STREAM_LIFE_S, model_id=model, after_seq=seq
            )

        return watch(connect, residency_event_from_pb, after_seq=after_seq, deadline_s=deadline_s)

    def load(self, model_id: str, *, node: str = "", device: str = "") -> Residency:
        """Asks for a model to become resident; returns at once, with a residency that may still be loading."""
        answer = self._registry.unary(
            "ResidencyService.LoadModel",
            request_id=new_request_id(),
            model_id=model_id,
            node_id=node,
            device_id=device,
        )
        return residency_from_pb(answer.residency)

    def unload(self, model_id: str, *, node: str = "", force: bool = False) -> tuple[Residency, ...]:
        """Drains and unloads a model on one node, or everywhere; ModelInUse while leased or pinned, unless `force`."""
        answer = self._registry.unary(
            "ResidencyService.UnloadModel", request_id=new_request_id(), model_id=model_id, node_id=node, force=force
        )
        return tuple(residency_from_pb(one) for one in answer.residencies)
