"""The registry as this node reaches it: every answer a value, every failure an error of ours, every call a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from headrace.registry.v1 import (
    activation_set_service_pb2,
    activation_set_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    residency_service_pb2,
    residency_service_pb2_grpc,
)
from headrace_extractor.errors import ExtractorError, Failure, RegistryUnavailable, error_for
from headrace_extractor.extractions.ports import QueuePosition
from headrace_extractor.meters import Transfer
from headrace_extractor.models import ModelInfo
from headrace_extractor.node.values import (
    Build,
    DesiredState,
    Device,
    Lease,
    Machine,
    ResidencyReport,
    ValidationReport,
)
from headrace_extractor.rpc.convert import nodes as convert
from headrace_extractor.rpc.convert import sets as set_convert
from headrace_extractor.rpc.convert.common import transfer_from_pb, transfer_to_pb
from headrace_extractor.sets.notes import HeldSet, SetOrders

CALL_DEADLINE_S = 15.0
# The registry repeats the desired state every 15 s; three of them missing is silence.
ASSIGNMENT_SILENCE_S = 45.0
LEASE_TTL_S = 60.0
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A registry that comes back is found within a second or two.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

T = TypeVar("T")


class RegistryClient:
    """Implements the ports NodeRegistry, SetRegistry and Models over one channel."""

    def __init__(
        self,
        address: str,
        *,
        node_id: str,
        version: str,
        boot_nonce: str,
        token: str = "",
        root_certificates: bytes | None = None,
    ) -> None:
        if root_certificates is None:
            self._channel = grpc.aio.insecure_channel(address, options=_KEEPALIVE)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates)
            self._channel = grpc.aio.secure_channel(address, credentials, options=_KEEPALIVE)
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.node_id = node_id
        self._version = version
        self._boot_nonce = boot_nonce
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._nodes = node_service_pb2_grpc.NodeServiceStub(self._channel)
        self._residencies = residency_service_pb2_grpc.ResidencyServiceStub(self._channel)
        self._sets = activation_set_service_pb2_grpc.ActivationSetServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    # -- NodeRegistry -------------------------------------------------------------------------------------------------

    async def register(self, address: str, devices: Sequence[Device], machine: Machine) -> tuple[int, float]:
        """Announces this node, which clients reach at `address`; returns the epoch and the heartbeat interval in s."""
        request = node_service_pb2.RegisterNodeRequest(
            node_id=self.node_id,
            address=address,
            devices=[convert.device_to_pb(device) for device in devices],
            version=self._version,
            boot_nonce=self._boot_nonce,
            memory_bytes=machine.memory_bytes,
            runtime_bytes=machine.runtime_bytes,
            max_loads=machine.max_loads,
            max_residents=machine.max_residents,
        )
        with self._errors():
            answer = await self._nodes.RegisterNode(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)
        return answer.epoch, answer.heartbeat_interval_s

    async def heartbeat(self, epoch: int, devices: Sequence[Device], machine: Machine) -> None:
        """Tells that this node lives and what it has free."""
        request = node_service_pb2.HeartbeatRequest(
            node_id=self.node_id,
            epoch=epoch,
            devices=[convert.device_to_pb(device) for device in devices],
            memory_free_bytes=machine.memory_free_bytes,
            runtime_bytes=machine.runtime_bytes,
        )
        with self._errors():
            await self._nodes.Heartbeat(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)

    async def assignments(self, epoch: int) -> AsyncGenerator[DesiredState, None]:
        """Yields the whole desired state at once and after each change."""
        request = node_service_pb2.WatchAssignmentsRequest(node_id=self.node_id, epoch=epoch)
        call = self._nodes.WatchAssignments(request, metadata=self._metadata)
        try:
            with self._errors():
                while True:
                    async with asyncio.timeout(ASSIGNMENT_SILENCE_S):
                        message = await call.read()
                    if not isinstance(message, node_service_pb2.WatchAssignmentsResponse):
                        return  # End of the stream.
                    yield convert.desired_from_pb(message)
        except TimeoutError:
            raise self._unavailable("says nothing") from None
        finally:
            call.cancel()

    async def report_residency(self, epoch: int, report: ResidencyReport) -> None:
        """Tells how a residency stands."""
        request = convert.report_to_pb(self.node_id, epoch, report)
        with self._errors():
            await self._nodes.ReportResidency(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)

    async def report_build(
        self,
        epoch: int,
        build: Build,
        *,
        done: bool,
        transfer: Transfer | None,
        failure: Failure | None,
        fidelity: Mapping[str, Any] | None = None,
    ) -> None:
        """Tells how a build stands."""
        request = node_service_pb2.ReportBuildRequest(
            node_id=self.node_id,
            epoch=epoch,
            model_id=build.model.id,
            target_path=build.target_path,
            done=done,
            transfer=transfer_to_pb(transfer),
            failure=convert.failure_to_pb(failure),
            fidelity=convert.fidelity_to_pb(fidelity),
        )
        with self._errors():
            await self._nodes.ReportBuild(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)

    async def report_validation(self, epoch: int, report: ValidationReport) -> None:
        """Tells how a validation stands."""
        request = convert.validation_to_pb(self.node_id, epoch, report)
        with self._errors():
            await self._nodes.ReportValidation(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)

    # -- SetRegistry --------------------------------------------------------------------------------------------------

    async def report_set(self, epoch: int, held: HeldSet, *, evict: bool = False) -> SetOrders:
        """Tells what a set of this node holds; with `evict`, asks whether it may go."""
        request = activation_set_service_pb2.ReportActivationSetRequest(
            node_id=self.node_id,
            epoch=epoch,
            set=set_convert.held_set_to_pb(held, self.node_id),
            deleted=held.deleted,
            evict=evict,
        )
        with self._errors():
            answer = await self._sets.ReportActivationSet(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)
        return set_convert.answer_from_pb(answer)

    async def set_orders(self) -> dict[str, SetOrders]:
        """What the registry wants of each set that it knows to be here, by id."""
        orders: dict[str, SetOrders] = {}
        request = activation_set_service_pb2.ListActivationSetsRequest(node_id=self.node_id, page_size=1000)
        while True:
            with self._errors():
                page = await self._sets.ListActivationSets(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)
            orders |= {each.id: set_convert.orders_from_pb(each) for each in page.sets}
            if not page.next_page_token:
                return orders
            request.page_token = page.next_page_token

    # -- Models -------------------------------------------------------------------------------------------------------

    async def get_model(self, model_id: str) -> ModelInfo:
        """Reads one model."""
        request = model_service_pb2.GetModelRequest(model_id=model_id)
        with self._errors():
            answer = await self._models.GetModel(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)
        return convert.model_from_pb(answer.model)

    async def acquire_lease(
        self, model_id: str, *, holder: str, wait_s: float
    ) -> AsyncGenerator[Lease | Transfer | QueuePosition, None]:
        """Yields queue positions and loading progress, and the lease last."""
        request = residency_service_pb2.AcquireLeaseRequest(
            model_id=model_id, node_id=self.node_id, holder=holder, ttl_s=LEASE_TTL_S, wait_s=wait_s
        )
        call = self._residencies.AcquireLease(request, timeout=wait_s + CALL_DEADLINE_S, metadata=self._metadata)
        lease: Lease | None = None
        try:
            with self._errors():
                async for event in call:
                    kind = event.WhichOneof("event")
                    if kind == "granted":
                        # Kept to the end of the stream: a call cancelled before that is a lease given back.
                        lease = convert.lease_from_pb(event.granted.lease)
                    elif kind == "loading":
                        yield transfer_from_pb(event.loading.transfer)
                    elif kind == "queued":
                        yield QueuePosition(event.queued.position)
        finally:
            call.cancel()
        if lease:
            yield lease

    async def renew_lease(self, lease: Lease) -> None:
        """Extends a lease."""
        request = residency_service_pb2.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        with self._errors():
            await self._residencies.RenewLease(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)

    async def release_lease(self, lease: Lease) -> None:
        """Ends a lease."""
        request = residency_service_pb2.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence)
        with self._errors():
            await self._residencies.ReleaseLease(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as exc:
            raise self._error_of(exc) from exc

    def _error_of(self, exc: grpc.aio.AioRpcError) -> ExtractorError:
        reason, metadata = _error_info(exc)
        if reason and reason not in ("SHUTTING_DOWN", "DATABASE_UNAVAILABLE"):
            left_alone_s = float(metadata.get("left_alone_s", "0"))
            return error_for(reason, exc.details() or reason, metadata=metadata, left_alone_s=left_alone_s)
        if exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return self._unavailable(f"answers {exc.code().name}: {exc.details()}")
        return error_for("INTERNAL", f"The registry answered {exc.code().name}: {exc.details()}")

    def _unavailable(self, what: str) -> RegistryUnavailable:
        return RegistryUnavailable(
            f"The registry at {self._address} {what}. Is it running?"[:500],
            metadata={"registry": self._address},
            retry_after_s=1.0,
        )


def _error_info(exc: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    """Reason and metadata of a google.rpc.ErrorInfo; empty where the answer has none."""
    try:
        status = rpc_status.from_call(exc)
    except ValueError:
        return "", {}
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return info.reason, dict(info.metadata)
    return "", {}
