"""ActivationSetService: the list of sets on all nodes."""

from __future__ import annotations

from typing import Any

from headrace.registry.v1 import activation_set_service_pb2 as pb
from headrace.registry.v1 import activation_set_service_pb2_grpc

from registry_service.errors import FieldInvalid, NotImplementedYet
from registry_service.identifiers import checked_id, checked_text
from registry_service.paging import page_from
from registry_service.postgres.set_store import SetStore
from registry_service.rpc.convert import set_report_from_pb, set_to_pb

_DEFAULT_PAGE = 100


class SetServicer(activation_set_service_pb2_grpc.ActivationSetServiceServicer):
    """Check, call the store, fill the answer."""

    def __init__(self, *, sets: SetStore) -> None:
        self._sets = sets

    async def ListActivationSets(
        self, request: pb.ListActivationSetsRequest, context: Any
    ) -> pb.ListActivationSetsResponse:
        """Lists a page, the newest first."""
        model_id = checked_text(request.model_id, field="model_id")
        page = page_from(
            size=request.page_size,
            token=request.page_token,
            bound_to=("sets", model_id),
            default=_DEFAULT_PAGE,
            key_length=3,
        )
        sets, token = await self._sets.page(model_id=model_id, page=page)
        return pb.ListActivationSetsResponse(sets=[set_to_pb(each) for each in sets], next_page_token=token)

    async def GetActivationSet(self, request: pb.GetActivationSetRequest, context: Any) -> pb.GetActivationSetResponse:
        """Reads what each node holds of a set."""
        if not request.set_id:
            raise FieldInvalid("set_id", "is empty")
        sets = await self._sets.get(checked_text(request.set_id, field="set_id"))
        return pb.GetActivationSetResponse(sets=[set_to_pb(each) for each in sets])

    async def PinActivationSet(self, request: pb.PinActivationSetRequest, context: Any) -> pb.PinActivationSetResponse:
        """Not in this version."""
        raise NotImplementedYet("PinActivationSet is not available in this version; nothing is evicted yet")

    async def DeleteActivationSet(
        self, request: pb.DeleteActivationSetRequest, context: Any
    ) -> pb.DeleteActivationSetResponse:
        """Not in this version."""
        raise NotImplementedYet("DeleteActivationSet is not available in this version; remove the set's folder")

    async def ReportActivationSet(
        self, request: pb.ReportActivationSetRequest, context: Any
    ) -> pb.ReportActivationSetResponse:
        """Replaces what a node said of a set."""
        node_id = checked_id(request.node_id, field="node_id")
        report = set_report_from_pb(request.set, node_id=node_id)
        await self._sets.report(report, epoch=request.epoch, deleted=request.deleted)
        return pb.ReportActivationSetResponse()
