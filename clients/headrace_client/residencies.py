"""`client.residencies`: which model is in which device's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from headrace_client.errors import BY_REASON, DeadlineExceeded, HeadraceError
from headrace_client.progress import of_residency, told
from headrace_client.rpc.convert.residencies import eviction_from_pb, residency_event_from_pb, residency_from_pb
from headrace_client.rpc.endpoint import STREAM_LIFE_S, Endpoint, new_request_id
from headrace_client.rpc.nodes import Nodes
from headrace_client.rpc.server_stream import ServerStream
from headrace_client.rpc.watch import watch
from headrace_client.values import Eviction, Listing, Residency, ResidencyEvent, ResidencyState

# A load takes seconds at least; a watch of all residencies would hold a stream for it.
_POLL_S = 0.3


class Residencies:
    """Residencies, as the registry decides them."""

    def __init__(self, registry: Endpoint, nodes: Nodes) -> None:
        self._registry = registry
        self._nodes = nodes

    def list(self, *, model: str = "", node: str = "", include_ended: bool = False) -> Listing[Residency]:
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

    def wait(
        self,
        residency: Residency,
        on_progress: Callable[[Residency], None] | None = None,
        deadline_s: float = 3600.0,
        *,
        progress: bool = False,
    ) -> Residency:
        """Waits until the model is RESIDENT, with `progress` under a bar, which needs headrace[progress].

        Raises the error with which the residency ended, or DeadlineExceeded.
        """
        end_s = time.monotonic() + deadline_s
        with told(residency.model_id, on_progress, progress=progress, measure=of_residency) as tell:
            while True:
                tell(residency)
                if residency.state is ResidencyState.RESIDENT:
                    return residency
                if residency.ended:
                    reason = residency.failure.reason if residency.failure else residency.state.value
                    message = residency.failure.message if residency.failure else residency.reason
                    raise BY_REASON.get(reason, HeadraceError)(message, reason=reason)
                if time.monotonic() > end_s:
                    state = residency.state.lower()
                    raise DeadlineExceeded(f"{residency.model_id} is still {state} after {deadline_s:g} s")
                time.sleep(_POLL_S)
                residency = self._again(residency)

    def _again(self, residency: Residency) -> Residency:
        """Reads a residency again; another one of the model, if that serves in its place."""
        active = self.list(model=residency.model_id)
        if now := next((one for one in active if one.id == residency.id), None):
            return now
        ended = self.list(model=residency.model_id, include_ended=True)
        last = next((one for one in ended if one.id == residency.id), residency)
        # It ended before it was loaded, and another residency of the model serves in its place.
        return active[0] if active and last.state is ResidencyState.UNLOADED else last

    def unload(self, model_id: str, *, node: str = "", force: bool = False) -> Listing[Residency]:
        """Drains and unloads a model on one node, or everywhere; ModelInUse while leased or pinned, unless `force`."""
        answer = self._registry.unary(
            "ResidencyService.UnloadModel", request_id=new_request_id(), model_id=model_id, node_id=node, force=force
        )
        return Listing(residency_from_pb(one) for one in answer.residencies)

    def evict(self, free_bytes: int, *, node: str = "", device: str = "") -> Eviction:
        """Unloads the least recently used idle models of a device until so many bytes are free there.

        Without a node, the device is chosen where the fewest bytes have to go, GPUs before the CPU. CapacityBusy where
        models in use are in the way: then none is evicted.
        """
        answer = self._registry.unary(
            "ResidencyService.EvictModels",
            request_id=new_request_id(),
            free_bytes=free_bytes,
            node_id=node,
            device_id=device,
        )
        return eviction_from_pb(answer)
