"""ActivationSetService: the list of sets on all nodes."""

from __future__ import annotations

from typing import Any

from headrace.registry.v1 import activation_set_service_pb2 as pb
from headrace.registry.v1 import activation_set_service_pb2_grpc
from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_id, checked_request_id, checked_text
from headrace_registry.paging import page_from
from headrace_registry.postgres.models.sets import SetStore
from headrace_registry.postgres.requests import Request
from headrace_registry.rpc.convert.sets import orders_to_pb, set_pin_from_pb, set_report_from_pb, set_to_pb

_DEFAULT_PAGE = 100


class SetServicer(activation_set_service_pb2_grpc.ActivationSetServiceServicer):
    """Check, call the store, fill the answer."""

    def __init__(self, *, sets: SetStore) -> None:
        self._sets = sets

    async def ListActivationSets(
        self, request: pb.ListActivationSetsRequest, context: Any
    ) -> pb.ListActivationSetsResponse:
        """Lists a page of sets, the newest first."""
        model_id = checked_text(request.model_id, field="model_id")
        node_id = checked_text(request.node_id, field="node_id")
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("sets", model_id, node_id),
            default=_DEFAULT_PAGE,
            key_length=3,
        )
        sets, token = await self._sets.page(model_id=model_id, node_id=node_id, page=page)
        token, total = await page.counted(sets, token, lambda: self._sets.count(model_id=model_id, node_id=node_id))
        return pb.ListActivationSetsResponse(
            sets=[set_to_pb(each) for each in sets], next_page_token=token, total_size=total
        )

    async def GetActivationSet(self, request: pb.GetActivationSetRequest, context: Any) -> pb.GetActivationSetResponse:
        """Reads every node's part of a set."""
        sets = await self._sets.get(_set_id(request.set_id))
        return pb.GetActivationSetResponse(sets=[set_to_pb(each, in_full=True) for each in sets])

    async def PinActivationSet(self, request: pb.PinActivationSetRequest, context: Any) -> pb.PinActivationSetResponse:
        """Sets, changes or ends a pin."""
        pin = set_pin_from_pb(request)
        arguments = (pin.set_id, pin.owner, pin.reason, pin.expire_time)
        await self._sets.pin(pin, _request(request.request_id, "PinActivationSet", *arguments))
        return pb.PinActivationSetResponse()

    async def DeleteActivationSet(
        self, request: pb.DeleteActivationSetRequest, context: Any
    ) -> pb.DeleteActivationSetResponse:
        """Orders the nodes to delete a set."""
        set_id = _set_id(request.set_id)
        await self._sets.delete(set_id, _request(request.request_id, "DeleteActivationSet", set_id))
        return pb.DeleteActivationSetResponse()

    async def ReportActivationSet(
        self, request: pb.ReportActivationSetRequest, context: Any
    ) -> pb.ReportActivationSetResponse:
        """Replaces a node's report of a set, or lets the node evict the set; answers with the set's orders."""
        node_id = checked_id(request.node_id, field="node_id")
        if request.evict:
            orders = await self._sets.evict(_set_id(request.set.id), node_id=node_id, epoch=request.epoch)
        else:
            report = set_report_from_pb(request.set, node_id=node_id)
            orders = await self._sets.report(report, epoch=request.epoch, deleted=request.deleted)
        return orders_to_pb(orders)


def _set_id(value: str) -> str:
    if not value:
        raise FieldInvalid("set_id", "is empty")
    return checked_text(value, field="set_id")


def _request(request_id: str, method: str, *arguments: Any) -> Request:
    return Request.of_call(checked_request_id(request_id), method, *arguments)
