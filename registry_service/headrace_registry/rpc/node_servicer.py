"""NodeService: the calls by which extractors register, report and receive their desired state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from headrace.registry.v1 import node_service_pb2 as pb
from headrace.registry.v1 import node_service_pb2_grpc
from headrace_chassis.shutdown import Shutdown
from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_id, checked_text, clean_text
from headrace_registry.postgres.models.corpora import CorpusStore
from headrace_registry.postgres.models.preparations import PreparationStore
from headrace_registry.postgres.models.validations import ValidationStore
from headrace_registry.postgres.residency.nodes import NodeStore
from headrace_registry.postgres.residency.residencies import ResidencyStore
from headrace_registry.residency.desired import DesiredState
from headrace_registry.residency.nodes import Announcement, Pulse
from headrace_registry.residency.residency import ResidencyReport
from headrace_registry.rpc.convert.models import build_to_pb, fidelity_from_pb, model_to_pb
from headrace_registry.rpc.convert.residencies import (
    device_from_pb,
    failure_from_pb,
    residency_state_from_pb,
    residency_to_pb,
    transfer_from_pb,
)
from headrace_registry.rpc.convert.validations import (
    MAX_LOG_TAIL,
    validation_report_from_pb,
    validation_to_pb,
    versions_from_pb,
)
from headrace_registry.wakeups import Wakeups

# As the contract says. A node that missed a change has the right state again after this.
_REPEAT_S = 15.0
_MAX_CORPORA = 10_000


class NodeServicer(node_service_pb2_grpc.NodeServiceServicer):
    """Each method checks the request, calls a store and fills the answer."""

    def __init__(
        self,
        *,
        nodes: NodeStore,
        residencies: ResidencyStore,
        preparations: PreparationStore,
        validations: ValidationStore,
        corpora: CorpusStore,
        wakeups: Wakeups,
        shutdown: Shutdown,
        heartbeat_interval_s: float,
        repeat_s: float = _REPEAT_S,
    ) -> None:
        self._nodes = nodes
        self._residencies = residencies
        self._preparations = preparations
        self._validations = validations
        self._corpora = corpora
        self._wakeups = wakeups
        self._shutdown = shutdown
        self._heartbeat_interval_s = heartbeat_interval_s
        self._repeat_s = repeat_s

    async def RegisterNode(self, request: pb.RegisterNodeRequest, context: Any) -> pb.RegisterNodeResponse:
        """Starts an epoch, or keeps it for a known boot nonce; pinned models that are nowhere are loaded."""
        announcement = Announcement(
            node_id=request.node_id,
            address=request.address,
            version=request.version,
            boot_nonce=request.boot_nonce,
            devices=tuple(device_from_pb(device) for device in request.devices),
            memory_bytes=request.memory_bytes,
            runtime_bytes=request.runtime_bytes,
            max_loads=request.max_loads,
            max_residents=request.max_residents,
        )
        epoch = await self._nodes.register(announcement)
        await self._residencies.load_pinned(announcement.node_id)
        return pb.RegisterNodeResponse(epoch=epoch, heartbeat_interval_s=self._heartbeat_interval_s)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        """Notes that the node lives."""
        pulse = Pulse(
            devices=tuple((device.id, device.free_bytes, device.lost_bytes) for device in request.devices),
            memory_free_bytes=request.memory_free_bytes,
            runtime_bytes=request.runtime_bytes,
        )
        await self._nodes.heartbeat(_node_id(request.node_id), request.epoch, pulse)
        return pb.HeartbeatResponse()

    async def WatchAssignments(
        self, request: pb.WatchAssignmentsRequest, context: Any
    ) -> AsyncGenerator[pb.WatchAssignmentsResponse, None]:
        """Streams the whole desired state, after each change and every 15 s."""
        node_id = _node_id(request.node_id)
        await self._nodes.hear(node_id, request.epoch)
        async with aclosing(self._shutdown.watching(self._states(node_id, request.epoch))) as states:
            async for state in states:
                yield _desired_to_pb(state)

    async def _states(self, node_id: str, epoch: int) -> AsyncGenerator[DesiredState, None]:
        loop = asyncio.get_running_loop()
        sent: tuple[object, ...] | None = None
        sent_at = 0.0
        while True:
            seen = self._wakeups.generation
            state = await self._nodes.desired(node_id, epoch)
            if state is not None and (state.key() != sent or loop.time() - sent_at >= self._repeat_s):
                yield state
                sent, sent_at = state.key(), loop.time()
            await self._wakeups.wait(seen)

    async def ReportResidency(self, request: pb.ReportResidencyRequest, context: Any) -> pb.ReportResidencyResponse:
        """Follows a node's report on a residency."""
        report = ResidencyReport(
            node_id=_node_id(request.node_id),
            epoch=request.epoch,
            residency_id=checked_text(request.residency_id, field="residency_id", max_length=63),
            fence=request.fence,
            state=residency_state_from_pb(request.state),
            transfer=transfer_from_pb(request.transfer) if request.HasField("transfer") else None,
            measured_bytes=request.measured_bytes,
            failure=failure_from_pb(request.failure) if request.HasField("failure") else None,
            lost_bytes=request.lost_bytes,
            versions=versions_from_pb(request.versions),
            log_tail=clean_text(request.log_tail[-MAX_LOG_TAIL:], MAX_LOG_TAIL),
        )
        for field in ("measured_bytes", "lost_bytes"):
            if getattr(request, field) < 0:
                raise FieldInvalid(field, "must not be negative")
        await self._residencies.report(report)
        return pb.ReportResidencyResponse()

    async def ReportBuild(self, request: pb.ReportBuildRequest, context: Any) -> pb.ReportBuildResponse:
        """Stores a node's report on a build."""
        await self._preparations.report_build(
            node_id=_node_id(request.node_id),
            epoch=request.epoch,
            model_id=checked_id(request.model_id, field="model_id"),
            target_path=checked_text(request.target_path, field="target_path", max_length=4096),
            done=request.done,
            transfer=transfer_from_pb(request.transfer) if request.HasField("transfer") else None,
            failure=failure_from_pb(request.failure) if request.HasField("failure") else None,
            fidelity=fidelity_from_pb(request.fidelity) if request.HasField("fidelity") else None,
        )
        return pb.ReportBuildResponse()

    async def ReportValidation(self, request: pb.ReportValidationRequest, context: Any) -> pb.ReportValidationResponse:
        """Stores a node's report on a validation."""
        await self._validations.report(validation_report_from_pb(request))
        return pb.ReportValidationResponse()

    async def ReportCorpora(self, request: pb.ReportCorporaRequest, context: Any) -> pb.ReportCorporaResponse:
        """Takes a node's corpora, or the documents that it wants to keep under an id."""
        if len(request.corpora) > _MAX_CORPORA:
            raise FieldInvalid("corpora", f"report {_MAX_CORPORA} corpora at most")
        digests = {
            checked_id(corpus.id, field="corpora.id"): checked_text(
                corpus.digest, field="corpora.digest", max_length=64
            )
            for corpus in request.corpora
        }
        report = self._corpora.replace if request.all else self._corpora.claim
        await report(_node_id(request.node_id), request.epoch, digests)
        return pb.ReportCorporaResponse()


def _desired_to_pb(state: DesiredState) -> pb.WatchAssignmentsResponse:
    return pb.WatchAssignmentsResponse(
        assignments=[
            pb.Assignment(residency=residency_to_pb(residency), model=model_to_pb(model))
            for residency, model in state.assignments
        ],
        builds=[build_to_pb(build) for build in state.builds],
        validations=[validation_to_pb(validation) for validation in state.validations],
    )


def _node_id(value: str) -> str:
    return checked_id(value, field="node_id")
