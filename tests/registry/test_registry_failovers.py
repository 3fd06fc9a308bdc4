"""Two replicas under load while their database is stopped, restarted, killed, made read-only and demoted, in a loop.

`HEADRACE_FAILOVERS=100` sets the number of rounds; `make failovers` runs so many, and `make fault` a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from fix_postgres import RegistryStubs, refusal_of
from fix_registry import (
    FakeNode,
    cpu,
    lease_request,
    new_request_id,
    ready_model,
    register_folder,
    until,
    until_state,
    write_model,
)
from headrace.registry.v1 import model_pb2, residency_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import residency_service_pb2 as residency_service
from headrace_registry.postgres.server.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.fault, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("HEADRACE_FAILOVERS", "10"))
SERVING = health_pb2.HealthCheckResponse.SERVING
# A call ends within its deadline, with a moment for the machine that runs all of this on two cores.
DEADLINE_S = 5.0
LATE_S = 1.5
# While the database changes its mind, calls may also hear that the registry has not heard of the node for a while.
EXPECTED = {"OK", "DATABASE_UNAVAILABLE"}
OF_LEASES = EXPECTED | {"NODE_LOST", "LEASE_LOST", "ADMISSION_TIMEOUT", "LEASE_NOT_FOUND"}


@dataclass
class Server:
    """A Postgres that fails in every way."""

    postgres: EmbeddedPostgres

    def admin(self, statement: str) -> None:
        # Works on a read-only server too.
        with psycopg.connect(
            self.postgres.url, autocommit=True, options="-c default_transaction_read_only=off"
        ) as conn:
            conn.execute(statement)

    async def stop(self, away_s: float) -> None:
        await asyncio.to_thread(self.postgres.stop)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.postgres.start)

    async def restart(self, away_s: float) -> None:
        await self.stop(0.0)

    async def kill(self, away_s: float) -> None:
        pid = int((self.postgres.pgdata / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.postgres.start)

    async def read_only(self, away_s: float) -> None:
        await asyncio.to_thread(self.admin, "ALTER SYSTEM SET default_transaction_read_only = on")
        await asyncio.to_thread(self.admin, "SELECT pg_reload_conf()")
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.admin, "ALTER SYSTEM RESET default_transaction_read_only")
        await asyncio.to_thread(self.admin, "SELECT pg_reload_conf()")

    async def demote(self, away_s: float) -> None:
        """Comes back as a replica, and is promoted."""
        await asyncio.to_thread(self.postgres.stop)
        (self.postgres.pgdata / "standby.signal").touch()
        await asyncio.to_thread(self.postgres.start)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.admin, "SELECT pg_promote()")


def reason_of(exc: grpc.aio.AioRpcError) -> str:
    """The reason of a refusal; the code's name if the answer has none."""
    status = rpc_status.from_call(exc)
    return exc.code().name if status is None else refusal_of(exc).reason


@dataclass
class Load:
    """Calls of all kinds on one replica, each counted by its outcome."""

    stubs: RegistryStubs
    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    unexpected: list[str] = field(default_factory=list)

    async def keep(self, call: Callable[[], Awaitable[object]], expected: set[str]) -> None:
        while True:
            started = time.monotonic()
            try:
                await call()
                reason = "OK"
            except grpc.aio.AioRpcError as exc:
                reason = reason_of(exc)
                if reason == "DATABASE_UNAVAILABLE" and not refusal_of(exc).retry_after_s:
                    reason = "no RetryInfo"
                if reason not in expected:
                    self.unexpected.append(f"{self.name}: {exc.code().name} {reason}: {exc.details()}")
            if call in (self.get, self.list, self.update):  # One call each, of a deadline of its own.
                self.longest_s = max(self.longest_s, time.monotonic() - started)
            self.outcomes[reason] += 1
            await asyncio.sleep(0.02)

    async def get(self) -> None:
        await self.stubs.models.GetModel(pb.GetModelRequest(model_id="tiny"), timeout=DEADLINE_S)

    async def list(self) -> None:
        await self.stubs.models.ListModels(pb.ListModelsRequest(), timeout=DEADLINE_S)

    async def update(self) -> None:
        labels = {"by": self.name, "n": uuid.uuid4().hex}
        request = pb.UpdateModelRequest(model=model_pb2.Model(id="tiny", labels=labels))
        request.update_mask.paths.append("labels")
        await self.stubs.models.UpdateModel(request, timeout=DEADLINE_S)

    async def lease(self) -> None:
        request = lease_request("tiny", wait_s=2.0, ttl_s=10.0)
        lease = None
        async for event in self.stubs.residencies.AcquireLease(request, timeout=DEADLINE_S):
            if event.WhichOneof("event") == "granted":
                lease = event.granted.lease
        assert lease is not None
        renewal = residency_service.RenewLeaseRequest(lease_id=lease.id, fence=lease.fence)
        await self.stubs.residencies.RenewLease(renewal, timeout=DEADLINE_S)
        release = residency_service.ReleaseLeaseRequest(lease_id=lease.id, fence=lease.fence)
        await self.stubs.residencies.ReleaseLease(release, timeout=DEADLINE_S)

    async def watch(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                async for _ in self.stubs.models.WatchModel(pb.WatchModelRequest(model_id="tiny")):
                    pass

    def start(self) -> list[asyncio.Task[None]]:
        plain = (self.get, self.list, self.update, self.watch)
        loops = [*((each, EXPECTED) for each in plain), (self.lease, OF_LEASES)]
        return [asyncio.create_task(self.keep(call, expected)) for call, expected in loops]


class Node(FakeNode):
    """A node that comes back by itself, as an extractor does."""

    async def live(self) -> None:
        while True:
            try:
                await self.register()
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._beat())
                    group.create_task(self._follow())
            except* grpc.aio.AioRpcError:
                await asyncio.sleep(0.2)

    async def report(self, residency, state, **fields) -> None:
        while True:
            try:
                return await super().report(residency, state, **fields)
            except grpc.aio.AioRpcError as exc:
                if reason_of(exc) != "DATABASE_UNAVAILABLE":
                    raise
                await asyncio.sleep(0.2)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self.heartbeat()


async def prepares(stubs: RegistryStubs, folder, n: int) -> None:
    """Registers a model, prepares it across whatever happens, and deletes it."""
    name = f"prepared-{n}"

    async def tried(call: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await call()
            except grpc.aio.AioRpcError as exc:
                if reason_of(exc) != "DATABASE_UNAVAILABLE":
                    raise
                await asyncio.sleep(0.2)
            else:
                return

    await asyncio.to_thread(write_model, folder / name)
    await tried(lambda: register_folder(stubs, folder / name, name))
    prepare = pb.PrepareModelRequest(model_id=name, request_id=new_request_id())
    await tried(lambda: stubs.models.PrepareModel(prepare, timeout=DEADLINE_S))
    await tried(lambda: until_state(stubs, name, model_pb2.MODEL_STATE_READY, timeout_s=60))
    delete = pb.DeleteModelRequest(model_id=name, request_id=new_request_id())
    await tried(lambda: stubs.models.DeleteModel(delete, timeout=DEADLINE_S))


async def serves(channel: grpc.aio.Channel) -> bool:
    check = health_pb2.HealthCheckRequest(service="headrace.registry.v1.ModelService")
    return (await health_pb2_grpc.HealthStub(channel).Check(check, timeout=5)).status == SERVING


async def test_two_replicas_outlive_every_failover(start_registry, data_dir, tmp_path):
    # A kill of the server loses no commit: the system keeps what was written, and each commit is written.
    server = Server(EmbeddedPostgres(data_dir, settings=("fsync=off",)))
    await asyncio.to_thread(server.postgres.start)
    flags = ("--database-url", server.postgres.url, "--models-root", str(tmp_path), "--heartbeat-interval-s", "1")
    replicas = [await asyncio.to_thread(start_registry, *flags) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(each.address)) for each in replicas]
        loads = [Load(RegistryStubs(channel), f"replica {n}") for n, channel in enumerate(channels)]
        await ready_model(loads[0].stubs, tmp_path, "tiny")
        node = Node(loads[0].stubs, "node-a", [cpu()])
        node.load_gate.set()
        node.unload_gate.set()
        tasks = [asyncio.create_task(node.live()), *(task for load in loads for task in load.start())]
        kinds = itertools.cycle((server.stop, server.read_only, server.kill, server.restart, server.demote))
        n_not_serving = 0
        for number, fail in zip(range(ROUNDS), kinds, strict=False):
            preparing = [
                asyncio.create_task(prepares(load.stubs, tmp_path, 2 * number + n)) for n, load in enumerate(loads)
            ]
            # Long enough for health to tell, and in every other round a blink.
            away_s = 4.0 if number % 2 == 0 else 0.3
            failing = asyncio.create_task(fail(away_s))
            while not failing.done():
                n_not_serving += sum([not await serves(channel) for channel in channels])
                await asyncio.sleep(0.2)
            await failing
            async with asyncio.timeout(60):  # Everything converges.
                for load, channel in zip(loads, channels, strict=True):
                    await until(lambda channel=channel: serves(channel))
                    await until(lambda load=load: _works(load))
                await asyncio.gather(*preparing)
            assert [each.process.poll() for each in replicas] == [None, None]
        nodes = await loads[1].stubs.residencies.ListNodes(residency_service.ListNodesRequest(), timeout=10)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await node.stop()
    outcomes = sum((load.outcomes for load in loads), Counter())
    figures = {"rounds": ROUNDS, "calls": outcomes.total(), "outcomes": outcomes, "not_serving": n_not_serving}
    print(json.dumps(figures))  # noqa: T201 - `make failovers` shows it.

    assert [line for load in loads for line in load.unexpected] == []
    assert max(load.longest_s for load in loads) < DEADLINE_S + LATE_S
    assert [each.state for each in nodes.nodes] == [residency_pb2.NODE_STATE_ALIVE]
    assert n_not_serving > 0
    assert [await asyncio.to_thread(each.terminate) for each in replicas] == [0, 0]
    bugs = [line for each in replicas for line in each.log_lines() if line.get("level") == "error"]
    assert bugs == []


async def _works(load: Load) -> bool:
    """True once a change and a lease succeed again."""
    try:
        await load.update()
        await load.lease()
    except (grpc.aio.AioRpcError, AssertionError):
        return False
    return True
