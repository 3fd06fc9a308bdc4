"""ResidencyService: loads, leases and pins, and lists of nodes and residencies."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from headrace.registry.v1 import residency_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2_grpc
from headrace_chassis.shutdown import Shutdown
from headrace_chassis.watch import HEARTBEAT_INTERVAL_S, watch
from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_id, checked_owner, checked_request_id, checked_text
from headrace_registry.models.models import Transfer
from headrace_registry.paging import page_from
from headrace_registry.postgres.requests import Request
from headrace_registry.postgres.residency.events import EventStore
from headrace_registry.postgres.residency.leases import LeaseStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.pins import PinStore
from headrace_registry.postgres.residency.residencies import ResidencyStore
from headrace_registry.residency.events import ResidencyEvent
from headrace_registry.residency.leases import LeaseTerms, checked_ttl_s, checked_wait_s
from headrace_registry.residency.residency import Residency, ResidencyState
from headrace_registry.residency.wishes import LeaseProgress, Wish
from headrace_registry.rpc.convert.residencies import (
    lease_to_pb,
    node_to_pb,
    pin_from_pb,
    pin_to_pb,
    residency_event_to_pb,
    residency_to_pb,
    transfer_to_pb,
)
from headrace_registry.wakeups import Wakeups
from headrace_registry.workers.lease_wait import LeaseWaits
from headrace_registry.workers.watch import ResidencyWatch

_DEFAULT_PAGE = 100


class ResidencyServicer(residency_service_pb2_grpc.ResidencyServiceServicer):
    """Each method checks the request, calls a store or worker and fills the answer."""

    def __init__(
        self,
        *,
        residencies: ResidencyStore,
        leases: LeaseStore,
        nodes: NodeStore,
        lease_waits: LeaseWaits,
        pins: PinStore,
        events: EventStore,
        wakeups: Wakeups,
        shutdown: Shutdown,
        heartbeat_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        self._residencies = residencies
        self._leases = leases
        self._nodes = nodes
        self._lease_waits = lease_waits
        self._pins = pins
        self._events = events
        self._wakeups = wakeups
        self._shutdown = shutdown
        self._heartbeat_s = heartbeat_s

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """Starts or queues the load of a model; answers at once."""
        wish = _wish(request, actor=f"LoadModel from {_peer(context)}")
        remembered = _request(request.request_id, "LoadModel", wish.model_id, wish.node_id, wish.device_id)
        (residency,) = await self._in_full([await self._residencies.load(wish, remembered)])
        return pb.LoadModelResponse(residency=residency_to_pb(residency))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """Unloads a model from its devices."""
        model_id = checked_id(request.model_id, field="model_id")
        node_id = _optional_id(request.node_id, field="node_id")
        residencies = await self._residencies.unload(
            model_id,
            node_id=node_id,
            force=request.force,
            actor=f"UnloadModel from {_peer(context)}",
            request=_request(request.request_id, "UnloadModel", model_id, node_id, request.force),
        )
        return pb.UnloadModelResponse(residencies=[residency_to_pb(each) for each in await self._in_full(residencies)])

    async def EvictModels(self, request: pb.EvictModelsRequest, context: Any) -> pb.EvictModelsResponse:
        """Evicts idle models until so many bytes are free on a device."""
        checked_request_id(request.request_id)
        if request.free_bytes <= 0:
            raise FieldInvalid("free_bytes", "must be positive")
        if request.device_id and not request.node_id:
            raise FieldInvalid("device_id", "names a device of a node; give node_id too")
        decided, residencies = await self._residencies.evict(
            request.free_bytes,
            node_id=_optional_id(request.node_id, field="node_id"),
            device_id=checked_text(request.device_id, field="device_id", max_length=63),
            actor=f"EvictModels from {_peer(context)}",
        )
        return pb.EvictModelsResponse(
            residencies=[residency_to_pb(each) for each in await self._in_full(residencies)],
            node_id=decided.node_id,
            device_id=decided.device.id,
            free_bytes=decided.free_bytes,
        )

    async def AcquireLease(
        self, request: pb.AcquireLeaseRequest, context: Any
    ) -> AsyncGenerator[pb.AcquireLeaseResponse, None]:
        """Streams the progress of the wait for a lease, the lease last."""
        holder = checked_text(request.holder, field="holder")
        wish = _wish(request, actor=holder or _peer(context), if_resident_only=request.if_resident_only)
        terms = LeaseTerms(
            holder=holder,
            ttl_s=checked_ttl_s(request.ttl_s),
            request_id=checked_request_id(request.request_id),
        )
        wait_s = checked_wait_s(request.wait_s)
        steps = self._lease_waits.acquire(wish, terms, waiter_id=uuid.uuid4().hex, wait_s=wait_s)
        async with aclosing(self._shutdown.watching(steps)) as watched:
            async for progress in watched:
                yield _progress_to_pb(progress)

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseResponse:
        """Extends a living lease."""
        lease = await self._leases.renew(_lease_id(request.lease_id), request.fence)
        return pb.RenewLeaseResponse(lease=lease_to_pb(lease))

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Any) -> pb.ReleaseLeaseResponse:
        """Ends a lease."""
        await self._leases.release(_lease_id(request.lease_id), request.fence)
        return pb.ReleaseLeaseResponse()

    async def PinModel(self, request: pb.PinModelRequest, context: Any) -> pb.PinModelResponse:
        """Sets or changes a pin."""
        pin = pin_from_pb(request.pin)
        arguments = (pin.model_id, pin.node_id, pin.owner, pin.reason, pin.expire_time)
        stored = await self._pins.pin(pin, _request(request.request_id, "PinModel", *arguments))
        return pb.PinModelResponse(pin=pin_to_pb(stored))

    async def UnpinModel(self, request: pb.UnpinModelRequest, context: Any) -> pb.UnpinModelResponse:
        """Removes a pin."""
        model_id = checked_id(request.model_id, field="model_id")
        node_id = _optional_id(request.node_id, field="node_id")
        owner = checked_owner(request.owner, field="owner")
        await self._pins.unpin(
            model_id,
            node_id=node_id,
            owner=owner,
            actor=f"UnpinModel from {_peer(context)}",
            request=_request(request.request_id, "UnpinModel", model_id, node_id, owner),
        )
        return pb.UnpinModelResponse()

    async def ListPins(self, request: pb.ListPinsRequest, context: Any) -> pb.ListPinsResponse:
        """Lists a page of living pins."""
        model_id = _optional_id(request.model_id, field="model_id")
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("pins", model_id),
            default=_DEFAULT_PAGE,
            key_length=3,
        )
        pins, token = await self._pins.page(model_id=model_id, page=page)
        return pb.ListPinsResponse(pins=[pin_to_pb(pin) for pin in pins], next_page_token=token)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        """Lists a page of nodes."""
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("nodes",),
            default=_DEFAULT_PAGE,
            key_length=1,
        )
        nodes, token = await self._nodes.page(page)
        return pb.ListNodesResponse(nodes=[node_to_pb(node) for node in nodes], next_page_token=token)

    async def ListResidencies(self, request: pb.ListResidenciesRequest, context: Any) -> pb.ListResidenciesResponse:
        """Lists a page of residencies, the newest first."""
        model_id = _optional_id(request.model_id, field="model_id")
        node_id = _optional_id(request.node_id, field="node_id")
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("residencies", model_id, node_id, str(request.include_ended)),
            default=_DEFAULT_PAGE,
            key_length=2,
        )
        which: dict[str, Any] = {"model_id": model_id, "node_id": node_id, "include_ended": request.include_ended}
        found, token = await self._residencies.page(**which, page=page)
        token, total = await page.counted(found, token, lambda: self._residencies.count(**which))
        return pb.ListResidenciesResponse(
            residencies=[residency_to_pb(each) for each in found], next_page_token=token, total_size=total
        )

    async def WatchResidencies(
        self, request: pb.WatchResidenciesRequest, context: Any
    ) -> AsyncGenerator[pb.WatchResidenciesResponse, None]:
        """Streams a snapshot, or the events since `after_seq`, then every event; heartbeats carry the last `seq`."""
        model_id = _optional_id(request.model_id, field="model_id")
        if request.after_seq < 0:
            raise FieldInvalid("after_seq", "must not be negative; 0 means from a snapshot on")
        watched = ResidencyWatch(self._events, self._wakeups, model_id=model_id, after_seq=request.after_seq)
        stream = watch(
            _messages(watched.events()),
            heartbeat=lambda: pb.WatchResidenciesResponse(seq=watched.seq, heartbeat=True),
            shutdown=self._shutdown,
            interval_s=self._heartbeat_s,
        )
        async with aclosing(stream) as messages:
            async for message in messages:
                yield message

    async def _in_full(self, residencies: Sequence[Residency]) -> list[Residency]:
        details = await self._residencies.details([each.id for each in residencies])
        return [details.get(each.id, each) for each in residencies]


async def _messages(events: AsyncGenerator[ResidencyEvent, None]) -> AsyncGenerator[pb.WatchResidenciesResponse, None]:
    async with aclosing(events):
        async for event in events:
            yield residency_event_to_pb(event)


def _progress_to_pb(progress: LeaseProgress) -> pb.AcquireLeaseResponse:
    if progress.lease is not None:
        return pb.AcquireLeaseResponse(granted=pb.LeaseGranted(lease=lease_to_pb(progress.lease)))
    residency = progress.residency
    assert residency is not None
    if residency.state is ResidencyState.QUEUED:
        return pb.AcquireLeaseResponse(queued=pb.LeaseQueued(position=progress.position))
    transfer = transfer_to_pb(residency.transfer or Transfer())
    return pb.AcquireLeaseResponse(loading=pb.LeaseLoading(residency_id=residency.id, transfer=transfer))


def _wish(request: pb.LoadModelRequest | pb.AcquireLeaseRequest, *, actor: str, if_resident_only: bool = False) -> Wish:
    if request.device_id and not request.node_id:
        raise FieldInvalid("device_id", "names a device of a node; give node_id too")
    return Wish(
        model_id=checked_id(request.model_id, field="model_id"),
        node_id=_optional_id(request.node_id, field="node_id"),
        device_id=checked_text(request.device_id, field="device_id", max_length=63),
        actor=actor,
        if_resident_only=if_resident_only,
    )


def _optional_id(value: str, *, field: str) -> str:
    return checked_id(value, field=field) if value else ""


def _lease_id(value: str) -> str:
    if not value:
        raise FieldInvalid("lease_id", "is empty; send the id of a granted lease")
    return checked_text(value, field="lease_id", max_length=63)


def _peer(context: Any) -> str:
    return str(context.peer())[:100]


def _request(request_id: str, method: str, *arguments: Any) -> Request:
    return Request.of_call(checked_request_id(request_id), method, *arguments)
