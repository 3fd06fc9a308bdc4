"""The registry as this node reaches it: every answer a value, every failure an error of ours, every call a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

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
from headrace_chassis.dialing import Credentials
from headrace_chassis.replicas import Replicas, is_away
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


class _Stubs:
    """The registry's services over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)
        self.nodes = node_service_pb2_grpc.NodeServiceStub(channel)
        self.residencies = residency_service_pb2_grpc.ResidencyServiceStub(channel)
        self.sets = activation_set_service_pb2_grpc.ActivationSetServiceStub(channel)


class RegistryClient:
    """Implements the ports NodeRegistry, CorpusRegistry, SetRegistry and Models, at the first replica that answers."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        node_id: str,
        version: str,
        boot_nonce: str,
        credentials: Credentials,
    ) -> None:
        self._replicas = Replicas(addresses, credentials)
        self._metadata = (("authorization", f"Bearer {credentials.token}"),) if credentials.token else ()
        self.node_id = node_id
        self._version = version
        self._boot_nonce = boot_nonce
        self._stubs: dict[grpc.aio.Channel, _Stubs] = {}

    async def close(self) -> None:
        """Closes the channels."""
        await self._replicas.close()

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
        answer = await self._call(lambda stubs: stubs.nodes.RegisterNode, request)
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
        await self._call(lambda stubs: stubs.nodes.Heartbeat, request)

    async def assignments(self, epoch: int) -> AsyncGenerator[DesiredState, None]:
        """Yields the whole desired state at once and after each change."""
        request = node_service_pb2.WatchAssignmentsRequest(node_id=self.node_id, epoch=epoch)
        messages = self._stream(lambda stubs: stubs.nodes.WatchAssignments, request, silence_s=ASSIGNMENT_SILENCE_S)
        async with aclosing(messages):
            async for message in messages:
                yield convert.desired_from_pb(message)

    async def report_residency(self, epoch: int, report: ResidencyReport) -> None:
        """Tells how a residency stands."""
        request = convert.report_to_pb(self.node_id, epoch, report)
        await self._call(lambda stubs: stubs.nodes.ReportResidency, request)

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
        await self._call(lambda stubs: stubs.nodes.ReportBuild, request)

    async def report_validation(self, epoch: int, report: ValidationReport) -> None:
        """Tells how a validation stands."""
        request = convert.validation_to_pb(self.node_id, epoch, report)
        await self._call(lambda stubs: stubs.nodes.ReportValidation, request)

    async def report_corpora(self, epoch: int, digests: Mapping[str, str], *, everything: bool) -> None:
        """Tells which corpora are here, or asks whether some may be kept."""
        request = node_service_pb2.ReportCorporaRequest(
            node_id=self.node_id,
            epoch=epoch,
            corpora=[node_service_pb2.HeldCorpus(id=name, digest=digest) for name, digest in sorted(digests.items())],
            all=everything,
        )
        await self._call(lambda stubs: stubs.nodes.ReportCorpora, request)

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
        answer = await self._call(lambda stubs: stubs.sets.ReportActivationSet, request)
        return set_convert.answer_from_pb(answer)

    async def set_orders(self) -> dict[str, SetOrders]:
        """What the registry wants of each set that it knows to be here, by id."""
        orders: dict[str, SetOrders] = {}
        request = activation_set_service_pb2.ListActivationSetsRequest(node_id=self.node_id, page_size=1000)
        while True:
            page = await self._call(lambda stubs: stubs.sets.ListActivationSets, request)
            orders |= {each.id: set_convert.orders_from_pb(each) for each in page.sets}
            if not page.next_page_token:
                return orders
            request.page_token = page.next_page_token

    # -- Models -------------------------------------------------------------------------------------------------------

    async def get_model(self, model_id: str) -> ModelInfo:
        """Reads one model."""
        request = model_service_pb2.GetModelRequest(model_id=model_id)
        answer = await self._call(lambda stubs: stubs.models.GetModel, request)
        return convert.model_from_pb(answer.model)

    async def acquire_lease(
        self, model_id: str, *, holder: str, wait_s: float
    ) -> AsyncGenerator[Lease | Transfer | QueuePosition, None]:
        """Yields queue positions and loading progress, and the lease last."""
        request = residency_service_pb2.AcquireLeaseRequest(
            model_id=model_id, node_id=self.node_id, holder=holder, ttl_s=LEASE_TTL_S, wait_s=wait_s
        )
        lease: Lease | None = None
        events = self._stream(lambda stubs: stubs.residencies.AcquireLease, request, life_s=wait_s + CALL_DEADLINE_S)
        async with aclosing(events):
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "granted":
                    # Kept to the end of the stream: a call cancelled before that is a lease given back.
                    lease = convert.lease_from_pb(event.granted.lease)
                elif kind == "loading":
                    yield transfer_from_pb(event.loading.transfer)
                elif kind == "queued":
                    yield QueuePosition(event.queued.position)
        if lease:
            yield lease

    async def renew_lease(self, lease: Lease) -> None:
        """Extends a lease."""
        request = residency_service_pb2.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        await self._call(lambda stubs: stubs.residencies.RenewLease, request)

    async def release_lease(self, lease: Lease) -> None:
        """Ends a lease."""
        request = residency_service_pb2.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence)
        await self._call(lambda stubs: stubs.residencies.ReleaseLease, request)

    # -- calls --------------------------------------------------------------------------------------------------------

    async def _call(self, method: Callable[[_Stubs], Any], request: Any) -> Any:
        """Calls a unary method; all of those used here may be repeated."""

        async def call(channel: grpc.aio.Channel, timeout_s: float) -> Any:
            return await method(self._stubs_of(channel))(request, timeout=timeout_s, metadata=self._metadata)

        try:
            return await self._replicas.answer(call, deadline_s=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as exc:
            raise await self._error_of(exc) from exc

    async def _stream(
        self,
        method: Callable[[_Stubs], Any],
        request: Any,
        *,
        silence_s: float | None = None,
        life_s: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Yields the messages of a streaming method that sends the first one at once; cancels the stream at the end.

        Raises RegistryUnavailable after `silence_s` without a message.
        """
        address = self._replicas.address

        async def open_(channel: grpc.aio.Channel, timeout_s: float) -> Any:
            nonlocal address
            address = self._replicas.address
            call = method(self._stubs_of(channel))(request, timeout=life_s, metadata=self._metadata)
            try:
                async with asyncio.timeout(timeout_s):
                    return call, await call.read()
            except BaseException as exc:
                call.cancel()
                if isinstance(exc, TimeoutError):  # As gRPC ends a unary call.
                    code, nothing = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata()
                    raise grpc.aio.AioRpcError(code, nothing, nothing, details="no message came") from None
                raise

        call = None
        try:
            call, message = await self._replicas.answer(open_, deadline_s=CALL_DEADLINE_S)
            while message is not grpc.aio.EOF:
                yield message
                async with asyncio.timeout(silence_s):
                    message = await call.read()
        except TimeoutError:
            self._replicas.move_on(address)
            raise self._unavailable("says nothing") from None
        except grpc.aio.AioRpcError as exc:
            if is_away(exc):
                self._replicas.move_on(address)
            raise await self._error_of(exc) from exc
        finally:
            if call is not None:
                call.cancel()

    def _stubs_of(self, channel: grpc.aio.Channel) -> _Stubs:
        if channel not in self._stubs:
            self._stubs[channel] = _Stubs(channel)
        return self._stubs[channel]

    async def _error_of(self, exc: grpc.aio.AioRpcError) -> ExtractorError:
        reason, metadata = _error_info(exc)
        if reason and reason not in ("SHUTTING_DOWN", "DATABASE_UNAVAILABLE"):
            left_alone_s = float(metadata.get("left_alone_s", "0"))
            return error_for(reason, exc.details() or reason, metadata=metadata, left_alone_s=left_alone_s)
        if exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            hint = await self._replicas.hint(exc, self._replicas.asked)
            return self._unavailable(f"answers {exc.code().name}: {exc.details()}", hint or "Is it running?")
        return error_for("INTERNAL", f"The registry answered {exc.code().name}: {exc.details()}")

    def _unavailable(self, what: str, hint: str = "Is it running?") -> RegistryUnavailable:
        address = self._replicas.asked
        return RegistryUnavailable(
            f"The registry at {address} {what[:400]}. {hint}", metadata={"registry": address}, retry_after_s=1.0
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
